"""Hooks that let a model's sequences begin behind prefaces."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from transformers import Cache

from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.before import Before
from ullage.kv.cache import PagedCache
from ullage.kv.entries import stored
from ullage.kv.given import given_cache, paged
from ullage.kv.preface import Heard, Note, Preface, read_before
from ullage.kv.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Choose = Callable[[list[int]], Preface | None]  # by the token ids of a prompt


@contextmanager
def prefaced(model: "PreTrainedModel", choose: Choose, name: str) -> Iterator[None]:
    """`model`, whose sequences begin behind what `choose` gives for their prompts. Where that is
    None for all of a batch, nothing is touched: they are the model's own, to the bit. A cache that
    holds something already goes on as it began. Left padding needs `position_ids`, as `generate`
    gives them. `name` is the technique's, for errors.

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


class _Hooks:
    """Around each forward pass of one model."""

    def __init__(self, model: "PreTrainedModel", choose: Choose, name: str) -> None:
        self.model, self.choose, self.name = model, choose, name
        self._open: list[ExitStack] = []  # of forward passes, one inside another
        self._inside = False  # a pass of ours in another: it begins behind nothing
        self._ours = WeakSet[PagedCache]()  # caches whose sequences all began here

    def begin(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The batch's cache with its prefaces, and our attention, where any begins with one."""
        if not self._inside:  # of a pass that Ctrl-C ended torch tells no hook
            while self._open:
                self.end()
        self._open.append(ExitStack())
        given = given_cache(kwargs)
        if isinstance(given, PagedCache):
            self._hear(given, args, kwargs)
        if self._is_to_begin(given):
            kwargs = self._begun(args, kwargs)
            given = given_cache(kwargs)
        if isinstance(given, PagedCache):
            self._open[-1].enter_context(attention.of_ours(self.model))
        return args, kwargs

    def end(self, *_: Any) -> None:
        """The model's own attention again, whatever ended the pass."""
        if self._open:
            self._open.pop().close()

    def _is_to_begin(self, given: Any) -> bool:
        """Whether a forward pass with this cache begins a sequence. Rows that are there already are
        of somebody who asks for what is `chosen`, or go on; but all that a row of ours had so far
        may have been padding."""
        if isinstance(given, Heard):
            return False
        if isinstance(given, PagedCache):
            rows = given.paged[0].rows
            if not rows:
                self._ours.add(given)  # even if nothing is chosen yet
            return not rows or (given in self._ours and any(not row.length for row in rows))
        return given is None or (isinstance(given, Cache) and not given.get_seq_length())

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        ids = _tokens(args, kwargs)
        with self._pass_inside():
            found = [self.choose(row) if row else None for row in ids]
        if all(preface is None for preface in found):
            return kwargs
        if kwargs.get("use_cache") is False:
            raise TechniqueError(f"{self.name} goes on from a cache: leave use_cache=False out.")
        kwargs = paged(self.model, kwargs, self.name)
        cache: PagedCache = given_cache(kwargs)
        self._ours.add(cache)
        dtype = cache.pool.dtype
        notes = [
            None if preface is None else Note(preface, row[0])
            for preface, row in zip(found, ids, strict=True)
        ]
        for number, layer in enumerate(cache.paged):
            layer.give_before(
                [
                    None if note is None else Before(note.preface.piece(number, dtype), note)
                    for note in notes
                ]
            )
        return kwargs

    def _hear(self, cache: PagedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take away from its rows what they have said."""
        rows = cache.paged[0].rows
        if not any(row.before for row in rows):
            return
        ids = args[0] if args else kwargs.get("input_ids")
        several = ids is not None and ids.shape[1] > 1
        begun = dict[int, Preface]()  # by first token
        for number, (row, new) in enumerate(zip(rows, _tokens(args, kwargs), strict=False)):
            if row.before is None or not new:
                continue
            was = row.before.note
            note = was.after(row.length, new, several)
            row.before = replace(row.before, note=note)
            sequence = [layer.rows[number] for layer in cache.paged]
            if note is None or (note.written and not was.written):
                for own in sequence:
                    own.before = note and note.written_behind(own.before)
            if note is None and was.first is not None:
                if was.first not in begun:
                    begun[was.first] = self._alone(was.first)
                _begin_again(sequence, begun[was.first])

    def _alone(self, first: int) -> Preface:
        """The entries of a sequence's first token that sees itself alone."""
        with self._pass_inside():
            return read_before(self.model, [first], [0], [0.0], end_position=1)

    @contextmanager
    def _pass_inside(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


def _begin_again(rows: list[Row], first: Preface) -> None:
    """Give a sequence's rows other entries of their first token. A model's attention rests on
    these: what goes on without a preface, but from a first token that saw it, falls apart."""
    for row, piece in zip(rows, first.pieces, strict=True):
        row.replace_first(stored(piece.keys, piece.values, row.pool.dtype))


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
