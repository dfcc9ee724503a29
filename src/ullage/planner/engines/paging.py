"""How vLLM pages KV entries: blocks of one size, shared by groups of layers.

Layers of one kind are one group. Where kinds differ (sliding and full, attention and state) every
group gets equally many layers, padding where there are too few, and all pages are made equally
large, so that any group can take any free block.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from ullage.planner.engines.shards import Stage
from ullage.specs.dtypes import KV_BITS
from ullage.specs.model import LayerCache, ModelSpec

BLOCK_TOKENS = 16
_LATENT_ALIGNMENT = 64  # tokens; what attention over latents wants beside states
_MOST_ALIKE = 1.5  # from here on the smaller kind sets the size of a group


@dataclass(frozen=True)
class Running:
    """What a sequence holds beside its tokens: `step_tokens` that are under way stand beside a
    window, and a state has `state_blocks`, more than one where prefixes are kept."""

    step_tokens: int
    state_blocks: int = 1


@dataclass(frozen=True)
class Group:
    """Layers that share one table of blocks. `window` counts tokens."""

    layers: int
    block_tokens: int
    window: int | None = None
    state: bool = False

    def blocks(self, tokens: int, running: Running) -> int:
        """Blocks of one sequence of `tokens`."""
        if self.state:
            return running.state_blocks
        if self.window is None:
            return ceil(tokens / self.block_tokens)
        # what a step reads stands beside the window, which may begin inside a block
        held = min(self.window - 1 + running.step_tokens, tokens)
        return ceil(held / self.block_tokens) + 1


@dataclass(frozen=True)
class Paging:
    """Blocks as one device holds them: `block_bytes` over all layers that share a block's number.

    `groups` draw from the same blocks.
    """

    groups: tuple[Group, ...]
    block_bytes: int

    def request_blocks(self, tokens: int, running: Running) -> int:
        """Blocks of one sequence, over all groups."""
        return sum(group.blocks(tokens, running) for group in self.groups)

    def request_bytes(self, tokens: int, running: Running) -> int:
        """Bytes of one sequence on this device."""
        return self.request_blocks(tokens, running) * self.block_bytes

    def pool_blocks(self, pool_bytes: int) -> int:
        """Blocks that a pool holds."""
        return pool_bytes // self.block_bytes if self.block_bytes else 0


@dataclass(frozen=True)
class _Kind:
    """Layers that are paged alike: bytes of one page, tokens in it."""

    page_bytes: int
    block_tokens: int
    window: int | None = None
    state: bool = False


@lru_cache(maxsize=256)
def paging(model: ModelSpec, kv_dtype: str, split: int, stage: Stage) -> Paging:
    """The blocks of `model` on one of `split` devices of `stage`."""
    latent = is_latent(model)
    kinds = Counter(_kinds(model.caches, kv_dtype, split, latent))
    here = Counter(_kinds([model.caches[layer] for layer in stage.layers], kv_dtype, split, latent))
    if not kinds:
        return Paging((), 0)
    if len({(kind.window, kind.state) for kind in kinds}) == 1:
        page_bytes = sum(kind.page_bytes * count for kind, count in here.items())
        kind = next(iter(kinds))
        group = Group(sum(here.values()), kind.block_tokens, kind.window, kind.state)
        return Paging((group,), page_bytes)
    return _grouped(kinds, len(stage.layers) / model.num_layers)


def _grouped(kinds: Counter[_Kind], share: float) -> Paging:
    """Groups of equally many layers, the padding of the last of each kind included."""
    page_bytes = max(kind.page_bytes for kind in kinds)
    size = _group_size(list(kinds.values()))
    here = ceil(size * share)
    groups = tuple(
        Group(here, _enlarged(kind, page_bytes), kind.window, kind.state)
        for kind, count in kinds.items()
        for _ in range(ceil(count / size))
    )
    return Paging(groups, here * page_bytes)


def _group_size(counts: list[int]) -> int:
    few, many = min(counts), max(counts)
    return many if many < few * _MOST_ALIKE else few


def _enlarged(kind: _Kind, page_bytes: int) -> int:
    """Tokens in a page that is as large as the largest kind's; what does not divide is padding."""
    return kind.block_tokens * max(1, page_bytes // kind.page_bytes)


def _kinds(caches: Sequence[LayerCache], kv_dtype: str, split: int, latent: bool) -> list[_Kind]:
    """One entry for each layer that keeps tokens, and one for each that keeps a state; an attention
    page grows until a state fits in it."""
    token_bytes = [_token_bytes(cache, kv_dtype, split) if cache.width else 0 for cache in caches]
    state_bytes = max((ceil(cache.state_bytes / split) for cache in caches), default=0)
    widest_bytes = max(token_bytes, default=0)
    block_tokens = BLOCK_TOKENS
    if state_bytes and widest_bytes:
        step = _LATENT_ALIGNMENT if latent else BLOCK_TOKENS
        block_tokens = step * ceil(state_bytes / (step * widest_bytes))
    found = []
    for cache, each_bytes in zip(caches, token_bytes, strict=True):
        if cache.width:
            page_bytes = int(each_bytes * block_tokens)
            found.append(_Kind(page_bytes, block_tokens, cache.window))
        if cache.state_bytes:
            page_bytes = int(max(state_bytes, widest_bytes * block_tokens))
            found.append(_Kind(page_bytes, block_tokens, state=True))
    return found


def _token_bytes(cache: LayerCache, kv_dtype: str, split: int) -> float:
    """Bytes of one token in one layer of one device: its KV heads', or a whole latent."""
    return cache.split_width(split) * KV_BITS[kv_dtype] / 8


def is_latent(model: ModelSpec) -> bool:
    """Whether what is cached is one latent for all heads."""
    growing = [cache for cache in model.caches if cache.width]
    return bool(growing) and all(cache.heads == 1 < model.num_kv_heads for cache in growing)
