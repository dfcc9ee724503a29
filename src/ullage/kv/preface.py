"""Prefaces: entries that a sequence sees before its own, as if it had read something that is no
part of it. They stand at positions before 0, so that a sequence's own positions, its length and its
masks are what they are without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ullage.kv import attention
from ullage.kv.before import Before
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.cache import Sequence as CacheSequence
from ullage.kv.entries import stored
from ullage.kv.kernels import Piece
from ullage.kv.pool import HeapBlocks
from ullage.specs.families import spec_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Preface:
    """What every layer's rows see: `pieces`, [Hkv, T, D] each in the model's format, all with the
    same bias. They see it until it is `said` by what is written behind the prompt, as token ids;
    from then on that itself is what they see of it. The newest `said_in` tokens, and what was not
    heard before, are enough to tell that; None: all are asked about. What is written sees it with
    the share `written_bias` of its bias: it needs less to go on than to begin."""

    pieces: tuple[Piece, ...]
    said: Callable[[list[int]], bool] | None = None
    written_bias: float = 1.0
    said_in: int | None = None

    def __len__(self) -> int:
        return len(self.pieces[0])

    @property
    def nbytes(self) -> int:
        """Of all layers, and of the bias, which is there once."""
        bias = self.pieces[0].bias
        own = sum(tensor.nbytes for piece in self.pieces for tensor in piece.tensors)
        return own + (0 if bias is None else bias.nbytes)

    @cached_property
    def bias_behind(self) -> torch.Tensor | None:
        """That of what is written, [Hkv, 1, T]: one tensor, so that kernels know it again."""
        bias = self.pieces[0].bias
        return bias if bias is None or self.written_bias == 1 else bias * self.written_bias

    def piece(self, layer: int, dtype: torch.dtype) -> Piece:
        """That of a layer, as a pool of `dtype` stores it; no copy where that is its format."""
        piece = self.pieces[layer]
        if piece.keys.dtype == dtype:
            return piece
        return replace(Piece.of(stored(piece.keys, piece.values, dtype)), bias=piece.bias)

    def put_before(self, sequence: CacheSequence, prompt_ids: Sequence[int]) -> None:
        """Let a sequence see it that goes on with this prompt."""
        first = None if sequence.length else prompt_ids[0]
        note = Note(self, first, sequence.length + len(prompt_ids))
        for layer, row in enumerate(sequence.rows):
            row.before = Before(self.piece(layer, row.pool.dtype), note)


@dataclass(frozen=True)
class Note:
    """What a row sees; the id of its first token, `first`, where that saw it too; where its prompt
    ends, and what is written behind that, as far back as that tells. Where nobody said, the prompt
    ends before the first pass of a token each."""

    preface: Preface
    first: int | None
    prompt_end: int | None = None
    written: tuple[int, ...] = ()

    def after(self, position: int, ids: list[int], several: bool) -> "Note | None":
        """With the tokens from `position` on; None where all is said before the last of them asks.
        Of `several` each may need what the others say: they are heard once they are read."""
        if self.prompt_end is None and several:
            return self
        end = position if self.prompt_end is None else self.prompt_end
        new = ids[max(0, end - position) :]
        known = (*self.written, *new)
        said, heard = self.preface.said, self.written if several else known
        if said is not None and heard and said(list(heard)):
            return None
        return replace(self, prompt_end=end, written=self._telling(known, len(new) * several))

    def _telling(self, written: tuple[int, ...], unheard: int) -> tuple[int, ...]:
        """What of it can tell anything yet."""
        newest = self.preface.said_in
        return written if newest is None else written[-(newest + unheard) :]

    def written_behind(self, before: Before) -> Before:
        """What the tokens that are written see of what those of the prompt did."""
        return Before(replace(before.piece, bias=self.preface.bias_behind), self)


@torch.no_grad()
def read_before(
    model: "PreTrainedModel",
    ids: Sequence[int],
    kept: Sequence[int],
    bias: Sequence[float],
    at_once: int | None = None,
    end_position: int = 0,
) -> Preface:
    """What `model` makes of the text `ids`, which ends just before `end_position`: the
    entries of the tokens at `kept`, whose scores get `bias` added. `at_once` tokens go through it
    in a forward pass; None: all of them."""
    spec = spec_from_config(model.config.get_text_config().to_dict())
    cache = Heard(spec, HeapBlocks(spec.head_dim, model.dtype, model.device))
    order = sorted(range(len(kept)), key=kept.__getitem__)  # as they are read
    chunk, end = at_once or len(ids), len(ids)
    positions = torch.arange(end_position - end, end_position, device=model.device)
    with attention.of_ours(model):
        for start in range(0, end, chunk):
            stop = min(start + chunk, end)
            places = [kept[at] - start for at in order if start <= kept[at] < stop]
            cache.keep = torch.tensor(places, dtype=torch.long, device=model.device)
            model(
                input_ids=torch.tensor([ids[start:stop]], device=model.device),
                position_ids=positions[None, start:stop],
                **cache_argument(model, cache),
                use_cache=True,
                logits_to_keep=1,
            )
    added = torch.tensor([bias[at] for at in order], device=model.device)
    added = added.expand(spec.num_kv_heads, 1, -1).contiguous()
    cache.reset()
    laid_out = ([torch.cat(parts, dim=1) for parts in zip(*own, strict=True)] for own in cache.own)
    return Preface(tuple(Piece(keys, values, bias=added) for keys, values in laid_out))


class Heard(PagedCache):
    """Keeps what each layer is given beside what its rows make of it: they may let go of some. Of
    the tokens of a pass those at `keep`: [Hkv, R, D] each."""

    keep: torch.Tensor  # [R]

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self.own: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.paged]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *more: Any,
        **named: Any,
    ) -> Any:  # fmt: skip
        own = key_states[0][:, self.keep], value_states[0][:, self.keep]
        self.own[layer_idx].append(own)
        return super().update(key_states, value_states, layer_idx, *more, **named)
