"""A technique's rows in a model: hooks that give its caches these rows, and the rows what they look
at beside entries."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.cache import MakeRow, PagedCache
from ullage.kv.given import given_cache, paged
from ullage.kv.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def rows_in(
    model: "PreTrainedModel", makers: Mapping[int, MakeRow], kind: type[Row], name: str
) -> Iterator[None]:
    """`model` with rows of a `kind` in the layers of `makers`, by number, whichever empty cache it
    is given, or none. A cache that is filled here goes on here; once it is reset, it is as it was
    given. `name` is the technique's, for errors.

    Raises:
        TechniqueError: the model has rows of a technique already, or takes no attention but its
            own. Its forward pass: a cache that holds other entries, or a part of the model alone.
    """
    for hook in model._forward_pre_hooks.values():
        if getattr(hook, "func", None) is _page:
            raise TechniqueError(
                f"{hook.args[1]} is attached to this model already: leave that `with` first."
            )
    attention.register()
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(attention.NAME)
        _refuse_others(model)
        hooks: list[tuple[torch.nn.Module, Callable[..., Any]]] = [
            (model, partial(_page, model, name))
        ]
        hooks += [
            (module, partial(_prepare, makers[layer], kind, name))
            for layer, module in attention.attention_modules(model)
            if layer in makers
        ]
        for module, hook in hooks:
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _page(
    model: "PreTrainedModel",
    name: str,
    _: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A PagedCache, whichever was given."""
    if kwargs.get("use_cache") is False:  # `generate` would give the text again, and our cache too
        raise TechniqueError(f"{name} is a way to keep the cache: leave use_cache=False out.")
    return args, paged(model, kwargs, name)


def _prepare(
    make_row: MakeRow,
    kind: type[Row],
    name: str,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Give the cache layer of this step its kind of rows, and the rotation and the hidden states of
    its tokens."""
    cache = given_cache(kwargs)
    if not isinstance(cache, PagedCache):
        raise TechniqueError(f"{name} is attached to the whole model: call that, not a part of it.")
    layer = cache.paged[module.layer_idx]  # type: ignore[index]
    hidden = args[0] if args else kwargs["hidden_states"]  # [B, N, hidden]
    layer.begin(len(hidden), make_row)
    if not all(isinstance(row, kind) for row in layer.rows):
        raise TechniqueError(
            f"{name} cannot go on from a PagedCache that keeps every entry: give it an empty one, "
            f"or one that was filled while {name} was attached."
        )
    cos, sin = kwargs.get("position_embeddings") or (None, None)
    layer.give_beside((cos, sin, hidden))


def _refuse_others(model: "PreTrainedModel") -> None:
    if model.config._attn_implementation != attention.NAME:
        raise TechniqueError(f"{type(model).__name__} takes no attention but its own.")
