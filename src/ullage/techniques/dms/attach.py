"""Sparse rows in a model: hooks that make its caches sparse and bring them what scorers look at."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.cache import MakeRow, PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks
from ullage.kv.sparse import SparseRow
from ullage.specs.families import spec_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHE_NAMES = ("cache", "past_key_values")


@contextmanager
def sparse(model: "PreTrainedModel", makers: Mapping[int, MakeRow]) -> Iterator[None]:
    """`model` with sparse rows in the layers of `makers`, by number, whichever empty cache it is
    given, or none. A cache that is filled here goes on here; once it is reset, it is as it was
    given.

    Raises:
        TechniqueError: the model has sparse rows already, or takes no attention but its own. Its
            forward pass: a cache that holds other entries, or a part of the model alone.
    """
    if any(getattr(hook, "func", None) is _page for hook in model._forward_pre_hooks.values()):
        raise TechniqueError("DMS is attached to this model already: leave that `with` first.")
    attention.register()
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(attention.NAME)
        _refuse_others(model)
        hooks: list[tuple[torch.nn.Module, Callable[..., Any]]] = [(model, partial(_page, model))]
        hooks += [
            (module, partial(_prepare, makers[module.layer_idx]))
            for name, module in model.named_modules()
            if name.endswith("attn") and getattr(module, "layer_idx", None) in makers
        ]
        for module, hook in hooks:
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _page(
    model: "PreTrainedModel", _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A PagedCache where none was given, or an empty one of transformers, as `generate` does."""
    if kwargs.get("use_cache") is False:  # `generate` would give the text again, and our cache too
        raise TechniqueError("DMS is a way to keep the cache: leave use_cache=False out.")
    given = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
    if isinstance(given, PagedCache):
        return args, kwargs
    if given is not None and not (isinstance(given, DynamicCache) and not given.get_seq_length()):
        raise TechniqueError(
            "DMS keeps entries in a PagedCache: it cannot go on from a given "
            f"{type(given).__name__}."
        )
    spec = spec_from_config(model.config.get_text_config().to_dict())
    pool = HeapBlocks(spec.head_dim, model.dtype, model.device)
    rest = {name: value for name, value in kwargs.items() if name not in _CACHE_NAMES}
    return args, {**rest, **cache_argument(model, PagedCache(spec, pool)), "use_cache": True}


def _prepare(
    make_row: MakeRow, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give the cache layer of this step its kind of rows, and the rotation and the hidden states of
    its tokens."""
    cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
    if not isinstance(cache, PagedCache):
        raise TechniqueError("DMS is attached to the whole model: call that, not a part of it.")
    layer = cache.paged[module.layer_idx]  # type: ignore[index]
    hidden = args[0] if args else kwargs["hidden_states"]  # [B, N, hidden]
    layer.begin(len(hidden), make_row)
    if not all(isinstance(row, SparseRow) for row in layer.rows):
        raise TechniqueError(
            "DMS cannot go on from a PagedCache that keeps every entry: give it an empty one, or "
            "one that was filled while DMS was attached."
        )
    cos, sin = kwargs.get("position_embeddings") or (None, None)
    layer.give_beside((cos, sin, hidden))


def _refuse_others(model: "PreTrainedModel") -> None:
    if model.config._attn_implementation != attention.NAME:
        raise TechniqueError(f"{type(model).__name__} takes no attention but its own.")
