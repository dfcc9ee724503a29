"""Prefaces: entries that a sequence sees before its own, as if it had read something that is no
part of it. They stand at positions before 0, so that a sequence's own positions, its length and its
masks are what they are without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from transformers import Cache

from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.cache import Sequence as CacheSequence
from ullage.kv.entries import stored
from ullage.kv.given import given_cache, paged
from ullage.kv.kernels import Piece
from ullage.kv.pool import HeapBlocks
from ullage.kv.rows import Before
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

    def piece(self, layer: int, dtype: torch.dtype) -> Piece:
        """That of a layer, as a pool of `dtype` stores it; no copy where that is its format."""
        piece = self.pieces[layer]
        if piece.keys.dtype == dtype:
            return piece
        return replace(Piece.of(stored(piece.keys, piece.values, dtype)), bias=piece.bias)

    def put_before(self, sequence: CacheSequence, prompt_tokens: int) -> None:
        """Let a sequence see it that goes on with a prompt of so many tokens."""
        note = _Note(self, sequence.length + prompt_tokens)
        for layer, row in enumerate(sequence.rows):
            row.before = Before(self.piece(layer, row.pool.dtype), note)


@dataclass(frozen=True)
class _Note:
    """What a row sees, where its prompt ends, and what is written behind that, as far back as that
    tells. Where nobody said, the prompt ends before the first pass of a token each."""

    preface: Preface
    prompt_end: int | None = None
    written: tuple[int, ...] = ()

    def after(self, position: int, ids: list[int], several: bool) -> "_Note | None":
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
        bias = before.piece.bias
        if bias is None or self.preface.written_bias == 1:
            return Before(before.piece, self)
        return Before(replace(before.piece, bias=bias * self.preface.written_bias), self)


Choose = Callable[[list[int]], Preface | None]  # by the token ids of a prompt


@contextmanager
def prefaced(model: "PreTrainedModel", choose: Choose, name: str) -> Iterator[None]:
    """`model`, whose sequences begin behind what `choose` gives for their prompts. Where that is
    None for all of a batch, nothing is touched: they are the model's own, to the bit. A cache that
    holds something already goes on as it began. `name` is the technique's, for errors.

    Raises:
        TechniqueError: a preface is attached to the model already, or it takes no attention but its
            own. Its forward pass: what would begin behind a preface keeps no cache, or one that can
            be made none of ours, as a StaticCache.
    """
    if _hooks_of(model) is not None:
        raise TechniqueError(f"{name} is attached to this model already: leave that `with` first.")
    attention.register()
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(attention.NAME)
        if model.config._attn_implementation != attention.NAME:
            raise TechniqueError(f"{type(model).__name__} takes no attention but its own.")
        model.set_attn_implementation(before)
        hooks = _Hooks(model, choose, name)
        undo.callback(
            model.register_forward_pre_hook(hooks.begin, with_kwargs=True, prepend=True).remove
        )
        undo.callback(model.register_forward_hook(hooks.end, always_call=True).remove)
        yield


def chosen(model: "PreTrainedModel", ids: list[int]) -> Preface | None:
    """What a sequence of this prompt begins behind, where that is not left to the forward pass: as
    a prompt is read in chunks, of which each knows itself alone."""
    hooks = _hooks_of(model)
    return None if hooks is None else hooks.choose(ids)


@torch.no_grad()
def read_before(
    model: "PreTrainedModel",
    ids: Sequence[int],
    kept: Sequence[int],
    bias: Sequence[float],
    at_once: int | None = None,
) -> Preface:
    """What `model` makes of the text `ids`, which ends just before position 0: the entries of the
    tokens at `kept`, whose scores get `bias` added. `at_once` tokens go through it in a forward
    pass; None: all of them."""
    spec = spec_from_config(model.config.get_text_config().to_dict())
    cache = _Heard(spec, HeapBlocks(spec.head_dim, model.dtype, model.device))
    order = sorted(range(len(kept)), key=kept.__getitem__)  # as they are read
    chunk, end = at_once or len(ids), len(ids)
    with _attention_of_ours(model):
        for start in range(0, end, chunk):
            stop = min(start + chunk, end)
            places = [kept[at] - start for at in order if start <= kept[at] < stop]
            cache.keep = torch.tensor(places, dtype=torch.long, device=model.device)
            model(
                input_ids=torch.tensor([ids[start:stop]], device=model.device),
                position_ids=torch.arange(start - end, stop - end, device=model.device)[None],
                **cache_argument(model, cache),
                use_cache=True,
                logits_to_keep=1,
            )
    added = torch.tensor([bias[at] for at in order], device=model.device)
    added = added.expand(spec.num_kv_heads, 1, -1).contiguous()
    cache.reset()
    laid_out = ([torch.cat(parts, dim=1) for parts in zip(*own, strict=True)] for own in cache.own)
    return Preface(tuple(Piece(keys, values, bias=added) for keys, values in laid_out))


class _Heard(PagedCache):
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


class _Hooks:
    """Around each forward pass of one model."""

    def __init__(self, model: "PreTrainedModel", choose: Choose, name: str) -> None:
        self.model, self.choose, self.name = model, choose, name
        self._open: list[ExitStack] = []  # of forward passes, one inside another
        self._choosing = False  # in which the model may read what it is to be given
        self._ours = WeakSet[PagedCache]()  # caches whose sequences all began here

    def begin(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The batch's cache with its prefaces, and our attention, where any begins with one."""
        if not self._choosing:  # of a pass that Ctrl-C ended torch tells no hook
            while self._open:
                self.end()
        self._open.append(ExitStack())
        given = given_cache(kwargs)
        if isinstance(given, PagedCache):
            _hear(given, args, kwargs)
        if self._is_to_begin(given):
            kwargs = self._begun(args, kwargs)
            given = given_cache(kwargs)
        if isinstance(given, PagedCache):
            self._open[-1].enter_context(_attention_of_ours(self.model))
        return args, kwargs

    def end(self, *_: Any) -> None:
        """The model's own attention again, whatever ended the pass."""
        if self._open:
            self._open.pop().close()

    def _is_to_begin(self, given: Any) -> bool:
        """Whether a forward pass with this cache begins a sequence. Rows that are there already are
        of somebody who asks for what is `chosen`, or go on; but all that a row of ours had so far
        may have been padding."""
        if isinstance(given, _Heard):
            return False
        if isinstance(given, PagedCache):
            rows = given.paged[0].rows
            if not rows:
                self._ours.add(given)  # even if nothing is chosen yet
            return not rows or (given in self._ours and any(not row.length for row in rows))
        return given is None or (isinstance(given, Cache) and not given.get_seq_length())

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        self._choosing = True
        try:
            found = [self.choose(ids) if ids else None for ids in _tokens(args, kwargs)]
        finally:
            self._choosing = False
        if all(preface is None for preface in found):
            return kwargs
        if kwargs.get("use_cache") is False:
            raise TechniqueError(f"{self.name} goes on from a cache: leave use_cache=False out.")
        kwargs = paged(self.model, kwargs, self.name)
        cache: PagedCache = given_cache(kwargs)
        self._ours.add(cache)
        dtype = cache.pool.dtype
        notes = [None if preface is None else _Note(preface) for preface in found]
        for number, layer in enumerate(cache.paged):
            layer.give_before(
                [
                    None if note is None else Before(note.preface.piece(number, dtype), note)
                    for note in notes
                ]
            )
        return kwargs


def _hear(cache: PagedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take away from its rows what they have said."""
    rows = cache.paged[0].rows
    if not any(row.before for row in rows):
        return
    ids = args[0] if args else kwargs.get("input_ids")
    several = ids is not None and ids.shape[1] > 1
    for number, (row, new) in enumerate(zip(rows, _tokens(args, kwargs), strict=False)):
        if row.before is None or not new:
            continue
        note, before = row.before.note.after(row.length, new, several), row.before.note
        row.before = replace(row.before, note=note)
        if note is None or (note.written and not before.written):
            for layer in cache.paged:
                layer.rows[number].before = note and note.written_behind(layer.rows[number].before)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[int]]:
    """The token ids of each row in this pass, without padding; none where it is given none."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        return []
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:  # one of `generate`'s own, or none
        return ids.tolist()  # type: ignore[no-any-return]
    pairs = zip(ids.tolist(), mask[:, -ids.shape[1] :].tolist(), strict=True)
    return [[token for token, real in zip(*row, strict=True) if real] for row in pairs]


def _hooks_of(model: "PreTrainedModel") -> _Hooks | None:
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _Hooks):
            return owner
    return None


@contextmanager
def _attention_of_ours(model: "PreTrainedModel") -> Iterator[None]:
    before = model.config._attn_implementation
    if before == attention.NAME:
        yield
        return
    attention.register()
    model.set_attn_implementation(attention.NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
