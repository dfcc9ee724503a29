"""The cache that a forward pass is given, and ours in its place."""

from typing import TYPE_CHECKING, Any

from transformers import Cache, DynamicCache

from ullage.errors import TechniqueError
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks
from ullage.specs.families import spec_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = ("cache", "past_key_values")


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among a forward pass's arguments, if any."""
    return next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)


def paged(model: "PreTrainedModel", kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """`kwargs` with a PagedCache: the given one, a new one where none is, and an empty
    DynamicCache, as `generate` makes and users do, made into one. `name` is the technique's.

    Raises:
        TechniqueError: another kind of cache, or a filled one.
    """
    given = given_cache(kwargs)
    if isinstance(given, PagedCache):
        return kwargs
    if given is not None and not (isinstance(given, DynamicCache) and not given.get_seq_length()):
        raise TechniqueError(
            f"{name} keeps entries in a PagedCache: it cannot go on from a given "
            f"{type(given).__name__}. Give none, and then the one that the output returns."
        )
    rest = {key: value for key, value in kwargs.items() if key not in _NAMES}
    return {**rest, **cache_argument(model, _become(model, given)), "use_cache": True}


def _become(model: "PreTrainedModel", given: DynamicCache | None) -> Cache:
    """A new PagedCache, which is the object `given`, if there is one: whoever made it goes on with
    what is written, as with any cache that they gave."""
    spec = spec_from_config(model.config.get_text_config().to_dict())
    cache = PagedCache(spec, HeapBlocks(spec.head_dim, model.dtype, model.device))
    if given is None:
        return cache
    given.__class__, given.__dict__ = PagedCache, cache.__dict__
    return given
