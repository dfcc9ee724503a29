"""What kernels/triton.py lets the device do, as numbers: where entries lie, and who reads which.

The query heads of one KV head are a lane; at N new tokens it has G N rows. A lane's pieces of one
format, one behind the other, are cut into splits of equally many tokens, so that a head with a
short past leaves no processor idle. The numbers, int64, one array after the other:

    segments  seventeen each: a KV head's part of a piece. Its lane, counted on from format to
              format; its tokens; the tokens before it in the lane; the addresses of its first key,
              value, scale of a key and of a value (0: no scales), bias (0: none) and of the first
              query that it is asked (0: no piece has queries of its own), and of the mask's first
              flag (0: no mask); the steps from a token to the next in K and in V, from a query to
              the next in mask and bias, and from a query head and from a query to the next in what
              it is asked, in numbers; whether it is causal
    splits    four each: lane, number within the lane, its first segment, the one after its last
    order     the splits' numbers, lane by lane
    bounds    where each lane's splits begin in `order`, and where the last one's end
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ullage.kv.kernels import Piece
from ullage.specs.tiles import split_tokens

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
_LANE, _TOKENS, _BEFORE = 0, 1, 2  # columns of a segment
_ADDRESSES, _STEPS = slice(3, 9), slice(10, 12)
_COLUMNS = 17
_HEADS, _HEAD_STEPS, _ITEM = 17, slice(18, 24), 24  # and of a piece, not yet told apart by heads


@dataclass(frozen=True)
class Work:
    """`numbers` as above. `launches` are the formats of the entries, each with its first split and
    the one after its last."""

    numbers: Integers
    splits_at: int
    order_at: int
    bounds_at: int
    launches: list[tuple[torch.dtype, int, int]]
    group: int  # query heads of a lane
    lanes: int
    split_size: int  # tokens
    aligned: bool  # every token's K and V at a multiple of 16 bytes
    asked: bool  # some piece has queries of its own

    @property
    def splits(self) -> int:
        """How many there are."""
        return (self.order_at - self.splits_at) // 4


def work_of(query: torch.Tensor, pieces: list[Piece]) -> Work:
    """The work of `query` [Hq, N, D] over `pieces`, of which there must be one, none empty; the
    last axes of all tensors contiguous."""
    heads, tokens, _ = query.shape
    seeing = pieces[0].heads or slice(0, heads)
    group = (seeing.stop - seeing.start) // pieces[0].keys.shape[0]
    lanes = heads // group
    formats = list(dict.fromkeys(piece.keys.dtype for piece in pieces))
    first_lanes = {dtype: at * lanes for at, dtype in enumerate(formats)}
    asked = any(piece.query is not None for piece in pieces)
    lines = np.array(
        [
            _line(piece, piece.asked(query) if asked else None, first_lanes, group)
            for piece in pieces
        ]
    )
    segments = _segments(lines)
    size = split_tokens(group * tokens, int(segments[:, _TOKENS].sum()))
    splits = _splits(segments, size)
    firsts = np.searchsorted(splits[:, 0], lanes * np.arange(len(formats) + 1)).tolist()
    splits[:, 0] %= lanes
    order = np.argsort(splits[:, 0], kind="stable")
    bounds = np.searchsorted(splits[order, 0], np.arange(lanes + 1))
    parts = [segments.ravel(), splits.ravel(), order, bounds]
    launches = [(dtype, *span) for dtype, span in zip(formats, pairwise(firsts), strict=True)]
    splits_at, order_at, bounds_at = np.cumsum([len(part) for part in parts[:-1]]).tolist()
    numbers = np.concatenate(parts)
    ats = (splits_at, order_at, bounds_at)
    return Work(numbers, *ats, launches, group, lanes, size, _aligned(lines), asked)


def _aligned(lines: Integers) -> bool:
    """Whether every token's K and V of all pieces begin at a multiple of 16 bytes."""
    places = (lines[:, _ADDRESSES][:, :2], lines[:, _HEAD_STEPS][:, :2])
    steps = lines[:, _STEPS] * lines[:, [_ITEM]]
    return not any((part % 16).any() for part in (*places, steps))


def _segments(lines: Integers) -> Integers:
    """[S, 17], sorted by lane."""
    heads = lines[:, _HEADS]
    segments = np.repeat(lines, heads, axis=0)
    head = np.arange(len(segments)) - np.repeat(np.cumsum(heads) - heads, heads)  # of its piece
    segments[:, _LANE] += head
    segments[:, _ADDRESSES] += head[:, None] * segments[:, _HEAD_STEPS]
    segments = segments[np.argsort(segments[:, _LANE], kind="stable"), :_COLUMNS]
    lanes, tokens = segments[:, _LANE], segments[:, _TOKENS]
    before = np.cumsum(tokens) - tokens
    segments[:, _BEFORE] = before - before[np.searchsorted(lanes, lanes)]
    return segments


def _line(
    piece: Piece, asked: torch.Tensor | None, first_lanes: dict[torch.dtype, int], group: int
) -> tuple[int, ...]:
    """The segment of the first KV head of `piece`, which is `asked` [H, N, D]; how many there are,
    the bytes from what each address says to the next head's, and those of a number. As plain
    numbers, since the host has little time for each."""
    keys, values, mask, bias = piece.keys, piece.values, piece.mask, piece.bias
    key_scales, value_scales = piece.key_scales, piece.value_scales
    heads, tokens, _ = keys.shape
    keys_head, keys_step, _ = keys.stride()
    values_head, values_step, _ = values.stride()
    asked_head, asked_step = (0, 0) if asked is None else asked.stride()[:2]
    return (
        first_lanes[keys.dtype] + (piece.heads.start // group if piece.heads else 0),
        tokens,
        0,
        keys.data_ptr(),
        values.data_ptr(),
        0 if key_scales is None else key_scales.data_ptr(),
        0 if value_scales is None else value_scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if asked is None else asked.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        keys_step,
        values_step,
        0 if mask is None else mask.stride(0),
        0 if bias is None or bias.shape[1] == 1 else bias.stride(1),
        asked_head,
        asked_step,
        piece.causal,
        heads,
        keys_head * keys.itemsize,
        values_head * values.itemsize,
        0 if key_scales is None else key_scales.stride(0) * key_scales.itemsize,
        0 if value_scales is None else value_scales.stride(0) * value_scales.itemsize,
        0 if bias is None else bias.stride(0) * bias.itemsize,
        0 if asked is None else group * asked_head * asked.itemsize,
        keys.itemsize,
    )


def _splits(segments: Integers, size: int) -> Integers:
    """[S, 4]: the lanes of `segments` in splits of `size` tokens."""
    first = np.flatnonzero(segments[:, _BEFORE] == 0)
    last = np.append(first[1:], len(segments))
    counts = -(-np.add.reduceat(segments[:, _TOKENS], first) // size)
    lanes = np.stack([segments[first, _LANE], np.zeros_like(first), first, last], axis=1)
    splits = np.repeat(lanes, counts, axis=0)
    splits[:, 1] = np.arange(len(splits)) - np.repeat(np.cumsum(counts) - counts, counts)
    return splits
