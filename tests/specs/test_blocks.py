"""Blocks of KV entries: whole ones, counted once for the planner and the pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.specs import blocks
from ullage.specs.model import ModelSpec
from ullage.specs.sources import resolve

tokens = st.integers(0, 200_000)
# Plain heads, a window, windows on some layers, and states that do not grow
MODELS = ("llama-3.1-8b", "mistral-7b-v0.1", "gemma-3-1b", "qwen3-next-80b-a3b")


@pytest.mark.parametrize(
    ("length", "heads_blocks"), [(0, 0), (1, 8), (16, 8), (17, 16), (4096, 8 * 256)]
)
def test_a_layers_blocks_are_whole_and_one_a_head(length: int, heads_blocks: int) -> None:
    llama = resolve("llama-3.1-8b")
    assert blocks.layer_blocks(llama, 31, length) == heads_blocks
    assert blocks.sequence_blocks(llama, length) == 32 * heads_blocks
    # 16 tokens x K and V x 128 numbers x 2 bytes
    assert blocks.block_bytes(llama, "bf16") == 8192
    assert blocks.sequence_bytes(llama, length, "bf16") == 32 * heads_blocks * 8192


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_byte_a_number_has_a_scale_for_each_key_and_value(kv_dtype: str) -> None:
    smol = resolve("smollm2-135m")
    assert blocks.block_bytes(smol, kv_dtype) == 16 * 2 * (64 + 2)
    assert blocks.block_bytes(smol, "bf16") / blocks.block_bytes(smol, kv_dtype) > 1.93
    for length in (1, 100, 4096):
        held = blocks.sequence_blocks(smol, length) * blocks.block_bytes(smol, kv_dtype)
        assert blocks.sequence_bytes(smol, length, kv_dtype) == held
        layer = blocks.dense_layer_bytes(smol, length, kv_dtype)
        assert layer * blocks.full_layers(smol) == held


def test_a_window_is_where_blocks_end() -> None:
    gemma = resolve("gemma-3-1b")  # one KV head; every sixth layer sees everything
    assert [blocks.layer_blocks(gemma, layer, 10_000) for layer in (0, 5)] == [32, 625]
    assert blocks.full_layers(gemma) == 4
    assert blocks.full_layers(resolve("mistral-7b-v0.1")) == 0
    assert blocks.full_layers(resolve("deepseek-v3")) == 0  # a latent has no heads


@given(st.sampled_from(MODELS), tokens, tokens)
def test_bytes_grow_with_tokens_and_hold_them_all(name: str, length: int, more: int) -> None:
    model = resolve(name)
    exact = sum(cache.width * cache.kept_tokens(length) for cache in model.caches) * 2
    held = blocks.sequence_bytes(model, length, "bf16") - model.state_bytes
    assert exact <= held <= exact + 15 * 2 * sum(cache.width for cache in model.caches)
    assert held <= blocks.sequence_bytes(model, length + more, "bf16") - model.state_bytes
    assert blocks.sequence_blocks(model, length) <= blocks.sequence_blocks(model, length + more)


@given(st.sampled_from(MODELS), tokens)
def test_a_number_of_fp32_takes_twice_that_of_bf16(name: str, length: int) -> None:
    model: ModelSpec = resolve(name)
    state = model.state_bytes
    narrow = blocks.sequence_bytes(model, length, "bf16") - state
    assert blocks.sequence_bytes(model, length, "fp32") - state == 2 * narrow
    narrow = blocks.dense_layer_bytes(model, length, "bf16")
    assert blocks.dense_layer_bytes(model, length, "fp32") == 2 * narrow


@given(tokens)
def test_a_layer_that_sees_everything_takes_its_share(length: int) -> None:
    model = resolve("llama-3.1-8b")
    layer = blocks.dense_layer_bytes(model, length, "bf16")
    assert layer * blocks.full_layers(model) == blocks.sequence_bytes(model, length, "bf16")
