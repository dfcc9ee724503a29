"""Attention on CUDA, in Triton: the past is split over the multiprocessors and joined afterwards.

A program takes a tile of a KV head's queries over one split of what that head keeps; a second
kernel joins the splits by their log-sum-exps. Which there are goes to the device as numbers, in one
asynchronous copy a call: nothing is compiled anew as lengths grow, and the host never waits.
Entries are converted to the query's format in registers, int8 and fp8 without their scales.

Scratch: D + 1 numbers in fp32 for each query of each split, whose number specs/tiles.py bounds
however long the past is, and the list of the work.
"""

from dataclasses import replace

import torch

from ullage.kv.host import sent
from ullage.kv.kernels import Piece, reference
from ullage.kv.kernels.triton_code import FORMATS, attend_split, join_splits
from ullage.kv.kernels.triton_work import Work, work_of
from ullage.specs.tiles import split_rows

_TILE_BYTES = 16 << 10  # of K, and as many of V: multiprocessors have room for two such pairs


def attend(
    query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None = None
) -> torch.Tensor:
    """See `ullage.kv.kernels.Kernel`."""
    if any(piece.keys.dtype not in FORMATS for piece in pieces):
        return reference.attend(query, pieces, scale, softcap)
    query, pieces = _packed(query), [_readable(piece) for piece in pieces if piece.keys.shape[1]]
    if not pieces:
        raise ValueError("attention over no entries at all")
    work = work_of(query, pieces)
    numbers = sent(torch.from_numpy(work.numbers), query.device)
    words = {
        "HIDING": any(piece.causal or piece.mask is not None for piece in pieces),
        "BIASED": any(piece.bias is not None for piece in pieces),
        "ASKED": work.asked,
        "CAPPED": softcap is not None,
    }
    partial, lse = _attend_splits(query, work, numbers, words, scale, softcap)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    rows, head_dim = partial.shape[1:]
    join_splits[(rows * work.lanes,)](
        partial, lse, numbers, output, work.order_at, work.bounds_at, rows, work.group,
        D=head_dim, WIDTH=_width(head_dim),
    )  # fmt: skip
    return output


def _attend_splits(
    query: torch.Tensor,
    work: Work,
    numbers: torch.Tensor,
    words: dict[str, bool],
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every split's output [S, G N, D] and log-sum-exp [S, G N], in fp32. `words` say what the
    program must know of."""
    rows, head_dim = work.group * query.shape[1], query.shape[2]
    partial = query.new_empty((work.splits, rows, head_dim), dtype=torch.float32)
    lse = query.new_empty((work.splits, rows), dtype=torch.float32)
    width, tile_rows = _width(head_dim), split_rows(rows)
    # Triton's interpreter, all that there is for a CPU, cannot multiply bf16
    product = query.dtype if query.is_cuda else torch.float32
    for stored, first, last in work.launches:
        attend_split[last - first, -(-rows // tile_rows)](
            query, numbers, partial, lse,
            query.stride(0), query.stride(1), work.splits_at, first, work.split_size,
            rows, work.group, scale, softcap or 0.0,
            D=head_dim, WIDTH=width, ROWS=tile_rows,
            TOKENS=_tile_tokens(width * max(stored.itemsize, product.itemsize)),
            STORED=FORMATS[stored], PRODUCT=FORMATS[product],
            ALIGNED=work.aligned, **words,
            num_warps=8 if tile_rows * width > 8192 else 4,
            num_stages=2 if tile_rows * width * product.itemsize < 64 << 10 else 1,
        )  # fmt: skip
    return partial, lse


def _width(head_dim: int) -> int:
    """Of a tile: what matrix instructions take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _tile_tokens(token_bytes: int) -> int:
    """Stored entries that a program reads at once."""
    return max(16, min(128, _TILE_BYTES // token_bytes))


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """With the last axis contiguous, as nearly all have it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _readable(piece: Piece) -> Piece:
    mask, bias, query = beside = (piece.mask, piece.bias, piece.query)
    if all(tensor is None or tensor.stride(-1) == 1 for tensor in (*piece.tensors, *beside)):
        return piece
    mask, bias, query = (None if part is None else _packed(part) for part in (mask, bias, query))
    entries = Piece.of(piece.each(_packed), piece.causal, mask)
    return replace(entries, heads=piece.heads, bias=bias, query=query)
