"""Blocks of vLLM's pool: worked by hand, and how they grow."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import ModelSpec, resolve
from ullage.planner.engines.paging import Group, Paging, Running, is_latent, paging
from ullage.planner.engines.shards import stages
from ullage.specs.model import LayerCache

LLAMA = resolve("llama-3.1-8b")
ONE = Running(8192)


def pages_of(model: ModelSpec, kv_dtype: str = "bf16", split: int = 1) -> Paging:
    return paging(model, kv_dtype, split, stages(model.num_layers, 1)[0])


def with_caches(*caches: LayerCache) -> ModelSpec:
    return replace(LLAMA, num_layers=len(caches), caches=caches)


def test_a_dense_model_takes_whole_blocks() -> None:
    """A block: 16 tokens x 2 x 8 heads x 128 x 2 B x 32 layers; 1,000 tokens take 63 of them."""
    pages = pages_of(LLAMA)
    assert pages.block_bytes == 16 * 2 * 8 * 128 * 2 * 32 == 2_097_152
    assert pages.request_bytes(1000, ONE) == 63 * 2_097_152
    assert pages.request_bytes(1008, ONE) == 63 * 2_097_152
    assert pages.request_bytes(1009, ONE) == 64 * 2_097_152


@pytest.mark.parametrize(
    ("tokens", "step", "blocks"),
    # of 10,000 the newest 99 and the 50 of a step: 149 tokens are 10 blocks, begun inside one
    [(10_000, 50, 11), (10_000, 45, 10), (10_000, 46, 11), (149, 50, 11), (144, 50, 10),
     (20, 50, 3)],
)  # fmt: skip
def test_a_window_holds_itself_and_a_step(tokens: int, step: int, blocks: int) -> None:
    assert Group(1, 16, window=100).blocks(tokens, Running(step)) == blocks


def test_a_state_takes_the_same_blocks_at_any_length() -> None:
    group = Group(1, 16, state=True)
    assert {group.blocks(tokens, Running(8192, 2)) for tokens in (1, 100, 1 << 20)} == {2}


def test_a_model_of_states_alone_takes_a_block_a_sequence() -> None:
    pages = pages_of(with_caches(*[LayerCache(0, state_bytes=3_000_000)] * 24))
    assert pages.block_bytes == 24 * 3_000_000
    assert pages.request_bytes(1, ONE) == pages.request_bytes(1 << 20, ONE) == 72_000_000
    assert pages.request_blocks(100, Running(8192, 2)) == 2


FULL, SLIDING = LayerCache(2048, heads=8), LayerCache(2048, 1024, heads=8)


@pytest.mark.parametrize(
    ("sliding", "full", "groups"),
    [
        (21, 21, [21, 21]),
        (40, 8, [8] * 6),
        (14, 10, [14, 14]),  # less than half as many again: the smaller kind is padded
        (15, 10, [10, 10, 10]),  # from there on the larger is cut up
    ],
)
def test_kinds_are_cut_into_groups_of_one_size(sliding: int, full: int, groups: list[int]) -> None:
    pages = pages_of(with_caches(*[SLIDING] * sliding, *[FULL] * full))
    assert [group.layers for group in pages.groups] == groups
    assert pages.block_bytes == groups[0] * 16 * 2048 * 2


def test_a_narrow_kind_has_more_tokens_in_a_page() -> None:
    """Pages are as large as the widest kind's: 16 tokens of 2,048 numbers are 64 of 512."""
    narrow = LayerCache(512, heads=2)
    wide, small = pages_of(with_caches(SLIDING, narrow)).groups
    assert (wide.block_tokens, small.block_tokens) == (16, 64)


def test_a_rank_of_a_pipeline_has_its_part_of_every_group() -> None:
    model = with_caches(*([SLIDING] * 5 + [FULL]) * 8)
    halves = [paging(model, "bf16", 1, stage) for stage in stages(48, 2)]
    whole = pages_of(model)
    assert [len(half.groups) for half in halves] == [len(whole.groups)] * 2 == [6, 6]
    assert [half.block_bytes * 2 for half in halves] == [whole.block_bytes] * 2


def test_a_model_without_caches_has_no_blocks() -> None:
    pages = pages_of(with_caches(LayerCache(0)))
    assert pages.request_bytes(1000, ONE) == pages.pool_blocks(1 << 30) == 0


@pytest.mark.parametrize(
    ("name", "latent"),
    [("deepseek-v2-lite", True), ("llama-3.1-8b", False), ("gemma-3-1b", False)],
)
def test_a_latent_is_one_head_for_many(name: str, latent: bool) -> None:
    assert is_latent(resolve(name)) is latent


caches = st.lists(
    st.sampled_from(
        [FULL, SLIDING, LayerCache(512, heads=2), LayerCache(0, state_bytes=700_001), LayerCache(0)]
    ),
    min_size=1,
    max_size=12,
).map(tuple)
sizes = st.integers(1, 300_000)


@given(caches, sizes, st.integers(0, 5000), st.integers(1, 9000), st.integers(0, 9000))
def test_blocks_never_fall_as_tokens_or_steps_grow(
    kept: tuple[LayerCache, ...], tokens: int, more: int, step: int, longer: int
) -> None:
    pages = pages_of(with_caches(*kept))
    small = pages.request_blocks(tokens, Running(step))
    assert small <= pages.request_blocks(tokens + more, Running(step))
    assert small <= pages.request_blocks(tokens, Running(step + longer, 2))


@given(caches, sizes, st.sampled_from([1, 2, 4, 8]), st.sampled_from(["bf16", "fp8"]))
def test_devices_together_page_at_least_what_is_kept(
    kept: tuple[LayerCache, ...], tokens: int, split: int, kv_dtype: str
) -> None:
    number_bytes = 2 if kv_dtype == "bf16" else 1
    least = sum(
        cache.width * cache.kept_tokens(tokens) * number_bytes + cache.state_bytes for cache in kept
    )
    held = pages_of(with_caches(*kept), kv_dtype, split).request_bytes(tokens, ONE)
    assert held * split >= least
    assert held <= pages_of(with_caches(*kept), kv_dtype).request_bytes(tokens, ONE)


@given(caches, st.integers(0, 1 << 40))
def test_a_pool_holds_no_more_than_its_bytes(kept: tuple[LayerCache, ...], pool: int) -> None:
    pages = pages_of(with_caches(*kept))
    blocks = pages.pool_blocks(pool)
    assert blocks * pages.block_bytes <= pool
    assert not pages.block_bytes or (blocks + 1) * pages.block_bytes > pool
