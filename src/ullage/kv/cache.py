"""PagedCache: a transformers Cache whose entries live in a KVPool."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache as cached
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ullage.errors import InputError
from ullage.kv.attention import Handed
from ullage.kv.before import Before
from ullage.kv.pool import Blocks
from ullage.kv.rows import FullRow, Row, SlidingRow
from ullage.specs.model import ModelSpec

MakeRow = Callable[[Blocks, int], Row]  # from the pool and the number of KV heads
# Cos and sin of a step's positions, [1 or B, N, D], and the hidden states of its tokens, [B, N, E]
Beside = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a PagedCache: a row for each sequence of the batch. Padding is never stored."""

    is_croppable = True  # so that `crop` is asked, which says why not

    def __init__(self, pool: Blocks, num_kv_heads: int, window: int | None) -> None:
        super().__init__()
        self.pool, self.num_kv_heads, self.window = pool, num_kv_heads, window
        self.is_sliding = window is not None
        self.is_initialized = True
        self.rows: list[Row] = []
        self.seen_tokens = 0  # positions of the batch, padding counted
        self.make_row: MakeRow | None = None  # a technique's; None: as the model says
        self._beside: Beside = (None, None, None)
        self._before: list[Before | None] = []

    def new_row(self) -> Row:
        """An empty row for one sequence."""
        if self.make_row is not None:
            return self.make_row(self.pool, self.num_kv_heads)
        if self.window is None:
            return FullRow(self.pool, self.num_kv_heads)
        return SlidingRow(self.pool, self.num_kv_heads, self.window)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the pool is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new entries, [B, Hkv, N, D] each, on to attention, which stores them."""
        if not self.rows:
            self.rows = [self.new_row() for _ in range(key_states.shape[0])]
        return Handed.on(key_states, self), value_states

    def begin(self, batch: int, make_row: MakeRow) -> None:
        """Empty rows of a kind of the caller's, where the layer has none; `make_row` makes these
        alone."""
        if not self.rows:
            self.rows = [make_row(self.pool, self.num_kv_heads) for _ in range(batch)]

    def give_beside(self, beside: Beside) -> None:
        """What a technique wants to be told of the next step's tokens, too."""
        self._beside = beside

    def take_beside(self) -> Beside:
        """What `give_beside` was given for this step."""
        beside, self._beside = self._beside, (None, None, None)
        return beside

    def give_before(self, before: list[Before | None]) -> None:
        """What each of the rows that begin with the next step is to see beside its own entries; of
        those that go on, nothing changes."""
        self._before = before

    def rows_of_step(self, batch: int, new_tokens: int) -> list[Row]:
        """The rows that the attention of this step extends, one for each of `batch`."""
        if batch != len(self.rows):
            raise RuntimeError(f"{batch} sequences for a cache that holds {len(self.rows)}")
        self.seen_tokens += new_tokens
        for row, before in zip(self.rows, self._before, strict=False):
            if not row.length:
                row.before = before
        self._before = []
        return self.rows

    def get_seq_length(self) -> int:
        """Positions seen, padding counted."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: the pool limits the bytes, nothing limits the length."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take no token back.

        Raises:
            InputError: some are to be: what a sliding or sparse row let go of for them is gone.
        """
        if tokens_to_remove:
            raise InputError(
                "A PagedCache takes no tokens back, as assisted decoding does: leave the assistant "
                "out."
            )

    def reset(self) -> None:
        """Give all blocks back."""
        for row in self.rows:
            row.release()
        self.rows, self._before, self.seen_tokens = [], [], 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Go on from the rows at `beam_idx`, [B]: a row that several go on from is copied.

        Raises:
            BudgetExceeded: the pool has too few blocks for the copies; this layer is as it was, and
                those before it have gone on.
        """
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times; raises what `reorder_cache` does."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices` alone, in that order; raises what `reorder_cache` does."""
        wanted = indices.tolist()
        copies: list[Row] = []
        rows: list[Row] = []
        try:
            for at, index in enumerate(wanted):
                if index in wanted[:at]:
                    copies.append(self.rows[index].copy())
                    rows.append(copies[-1])
                else:
                    rows.append(self.rows[index])
        except BaseException:
            for row in copies:
                row.release()
            raise
        for index, row in enumerate(self.rows):
            if index not in wanted:
                row.release()
        self.rows = rows


class Sequence:
    """One sequence's rows, a row a layer. Made by `PagedCache.open`."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.rows[0].length

    def copy(self) -> "Sequence":
        """A sequence with blocks of its own that holds the same and goes its own way from here.

        Raises:
            BudgetExceeded: the pool has too few blocks; nothing is taken.
        """
        twin = Sequence([])
        try:
            for row in self.rows:
                twin.rows.append(row.copy())
        except BaseException:
            twin.close()
            raise
        return twin

    def opened(self, cache: "PagedCache", tokens: int) -> "Sequence":
        """See `Start`.

        Raises:
            InputError: the sequence was closed, or is not of this cache's pool.
        """
        if not self.length or self.rows[0].pool is not cache.pool:
            raise InputError("A sequence goes on while it is open, in the engine that read it.")
        twin = self.copy()
        try:
            for row in twin.rows:
                row.reserve(tokens)
        except BaseException:
            twin.close()
            raise
        return twin

    def close(self) -> None:
        """Give all blocks back."""
        for row in self.rows:
            row.release()


class Start(Protocol):
    """What a sequence can begin with: all that is held of a text that was read before."""

    @property
    def length(self) -> int:
        """Tokens seen."""

    def opened(self, cache: "PagedCache", tokens: int) -> Sequence:
        """A sequence of `cache` that holds the same and goes its own way from here, with room for
        `tokens` in all.

        Raises:
            BudgetExceeded: the pool has too few blocks; nothing is taken.
        """


class PagedCache(Cache):  # type: ignore[misc]
    """KV entries of any number of sequences in one pool.

    Inside plain `model.generate(**cache_argument(model, cache))` it grows by itself. The engine
    opens each sequence with all the room it will need and chooses with `activate` whose turn it is.
    `rows` says what keeps a sequence's entries in a layer where they are not all kept.
    """

    def __init__(
        self, model: ModelSpec, pool: Blocks, rows: Mapping[int, MakeRow] | None = None
    ) -> None:
        self.paged = [PagedLayer(pool, model.num_kv_heads, window) for window in model.windows]
        for layer, make_row in (rows or {}).items():
            self.paged[layer].make_row = make_row
        super().__init__(layers=self.paged)
        self.pool = pool

    def open(self, tokens: int) -> Sequence:
        """A sequence with room for `tokens`.

        Raises:
            BudgetExceeded: the pool has too few blocks; nothing is taken.
        """
        sequence = Sequence([layer.new_row() for layer in self.paged])
        try:
            for row in sequence.rows:
                row.reserve(tokens)
        except BaseException:
            sequence.close()
            raise
        return sequence

    def activate(self, sequences: list[Sequence]) -> None:
        """Let the next forward passes extend `sequences`, in the batch's order."""
        for index, layer in enumerate(self.paged):
            layer.rows = [sequence.rows[index] for sequence in sequences]
            layer.seen_tokens = max((row.length for row in layer.rows), default=0)

    def nbytes(self) -> int:
        """Bytes of the blocks that are taken, and of what rows of this step keep beside them."""
        return self.pool.taken_bytes + sum(row.beside_bytes for row in self._rows)

    def live_tokens(self) -> float:
        """Entries that a KV head holds of the sequences of this step, all together; the mean over
        heads and layers."""
        return sum(row.live_tokens for row in self._rows) / len(self.paged)

    def kept(self) -> float:
        """The share of the tokens seen that `live_tokens` is; 1 before there is any."""
        seen = sum(row.length for row in self._rows) / len(self.paged)
        return self.live_tokens() / seen if seen else 1.0

    @property
    def _rows(self) -> list[Row]:
        return [row for layer in self.paged for row in layer.rows]


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """`cache` under the name by which the forward pass of `model` takes it: ``past_key_values``
    until transformers 5.24, which calls it ``cache`` and warns of the old name."""
    return {_cache_name(type(model).forward): cache}


@cached
def _cache_name(forward: Callable[..., Any]) -> str:
    known = inspect.signature(forward).parameters
    return "cache" if "cache" in known else "past_key_values"
