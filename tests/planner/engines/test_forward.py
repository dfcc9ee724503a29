"""A forward pass of transformers' modules, worked by hand on tiny models: hidden 32, MLP 48,
4 heads of 8 with 2 KV heads, 2 layers, 64 words."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ullage import ModelSpec
from ullage.planner.engines import forward
from ullage.specs.workload import Execution, PhaseName, Step

TinySpec = Callable[..., ModelSpec]


def step(
    dtype: str = "fp32", new: int = 10, held: int = 100, sequences: int = 1,
    phase: PhaseName = "prefill",
) -> Step:  # fmt: skip
    return Step(phase, sequences, held, new, Execution(dtype=dtype, kv_dtype=dtype))


@pytest.mark.parametrize(
    ("family", "changes", "numbers"),
    [
        # embedded token 32, cosines and sines 2 x 8; input, residual, norm 3 x 32; MLP 3 x 48
        ("llama", {}, 48 + 96 + 144),
        # input and its norm 2 x 32; q, its two halves and their sum 4 x 32; k and v 2 x 16
        ("llama", {"intermediate_size": 8}, 48 + 64 + 128 + 32),
        # one projection makes gate and up, so that it lives beside both: 4 x 48
        ("phi3", {}, 48 + 96 + 192),
        # token and position embedded, 2 x 32; a fourth copy of 32; a plain MLP's 4 x 48
        ("gpt2", {}, 64 + 128 + 192),
        # sliding and full layers have rotary tables of their own: 32 + 2 x 2 x 8
        ("gemma2", {}, 64 + 96 + 144),
    ],
)
def test_the_widest_place_of_a_layer(
    tiny_spec: TinySpec, family: str, changes: dict[str, Any], numbers: int
) -> None:
    spec = tiny_spec(family, **changes)
    assert forward.layer_term(spec, step("fp32")).nbytes == 10 * numbers * 4
    assert forward.layer_term(spec, step("bf16", new=7)).nbytes == 7 * numbers * 2


def test_the_source_says_which_place_is_the_widest(tiny_spec: TinySpec) -> None:
    assert "MLP" in forward.layer_term(tiny_spec("llama"), step()).source
    narrow = tiny_spec("llama", intermediate_size=8)
    assert "attention" in forward.layer_term(narrow, step()).source


def test_logits_are_a_row_a_sequence_and_its_fp32_copy(tiny_spec: TinySpec) -> None:
    spec = tiny_spec("llama")
    assert forward.logits_term(spec, step("fp32", sequences=3)).nbytes == 3 * 64 * (4 + 4)
    assert forward.logits_term(spec, step("bf16", sequences=3)).nbytes == 3 * 64 * (2 + 4)


@pytest.mark.parametrize(
    ("dtype", "score", "number"),
    # scores and their softmax in fp32; bf16 is widened for the softmax and narrowed again
    [("fp32", 8, 4), ("bf16", 10, 2)],
)
def test_eager_attention_builds_the_score_matrix(
    tiny_spec: TinySpec, dtype: str, score: int, number: int
) -> None:
    scores = 4 * 10 * 100 * score
    mask = 10 * 100 * number
    repeated = 100 * 2 * 4 * 8 * number  # K and V of all query heads
    spec = tiny_spec("llama")
    assert forward.eager_term(spec, step(dtype)).nbytes == scores + mask + repeated
    every_head = tiny_spec("llama", num_key_value_heads=4)
    assert forward.eager_term(every_head, step(dtype)).nbytes == scores + mask


def test_repeated_heads_count_for_every_sequence(tiny_spec: TinySpec) -> None:
    spec = tiny_spec("llama")
    assert forward.repeated_kv_bytes(spec, step(sequences=5)) == 5 * 100 * 64 * 4


def test_a_converted_weight_is_staged_one_at_a_time(tiny_spec: TinySpec) -> None:
    """Largest first. When the last of k and v is read, all is there but five norms of 32 numbers:
    its staging copy of 512 x 2 B stands on 5 x 32 x 4 B less than the whole."""
    spec = replace(tiny_spec("llama"), dtype="bf16")
    assert forward.conversion_term(spec, "fp32").nbytes == 512 * 2 - 5 * 32 * 4
    assert forward.conversion_term(spec, "bf16").nbytes == 0


def test_states_count_with_every_sequence(tiny_spec: TinySpec) -> None:
    spec = tiny_spec("llama")
    stated = replace(spec, caches=tuple(replace(cache, state_bytes=70) for cache in spec.caches))
    pass_ = step(sequences=3)
    bare, held = (forward.kv_term(one, pass_, "KV", 5, "").nbytes for one in (spec, stated))
    assert held - bare == 3 * 2 * 70
