"""Rows and widths of rotary tables, by hand from what configs state."""

from typing import Any

import pytest
from family_cases import CASES, case
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import ModelError, UnknownArchitecture
from ullage.specs.families import spec_from_config
from ullage.specs.sources import resolve

Tables = list[tuple[int, int]]

# Heads of 64 / 4 = 16 numbers and 128 positions, unless the case says otherwise.
SCALED: dict[str, tuple[dict[str, Any], Tables]] = {
    "none": ({}, [(128, 16)]),
    "null": ({"rope_scaling": None}, [(128, 16)]),
    "llama3 keeps its rows": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                          "original_max_position_embeddings": 16}}, [(128, 16)],
    ),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, [(512, 16)]),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.5}}, [(320, 16)]),
    # YaRN's rows are the original positions times the factor, not the config's times it
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 32}}, [(128, 16)],
    ),
    "yarn over its own positions": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, [(512, 16)],
    ),
    "longrope has a short and a long table": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
         "original_max_position_embeddings": 32}, [(160, 16)],
    ),
    "half of a head": ({"partial_rotary_factor": 0.5}, [(128, 8)]),
    "a part of a head, said inside": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, [(128, 4)],
    ),
    "more than a head is a head": ({"partial_rotary_factor": 2.0}, [(128, 16)]),
    "numbers of a head": ({"rotary_dim": 6}, [(128, 6)]),
    "no more numbers than a head has": ({"rotary_dim": 99}, [(128, 16)]),
    "a share goes before numbers": ({"rotary_dim": 6, "partial_rotary_factor": 0.5}, [(128, 8)]),
    "two kinds of layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0},
                             "sliding_attention": {"rope_type": "default"}}},
        [(256, 16), (128, 16)],
    ),
    "two kinds that are one": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4},
                             "sliding_attention": {"rope_theta": 1e4}}}, [(128, 16)],
    ),
}  # fmt: skip


def tables(config: dict[str, Any]) -> Tables:
    return [(table.rows, table.width) for table in spec_from_config(config).rope_tables]


@pytest.mark.parametrize("name", SCALED)
def test_rows_and_width_of_a_scaling(name: str) -> None:
    settings, expected = SCALED[name]
    assert tables(case("llama", **settings)) == expected


FAMILIES: dict[str, Tables] = {
    "gpt2": [],  # learned positions
    "falcon-alibi": [],
    "kimi_linear": [],
    "nemotron_h": [],
    "phi": [(128, 8)],  # half of 16
    "stablelm": [(128, 4)],  # a quarter of 16
    "deepseek_v3": [(128, 8)],  # qk_rope_head_dim, not the head's 12 + 8
    "qwen3_5": [(512, 4)],  # four times the positions for frames, a quarter of 16
    "glm4": [(128, 8)],
    "deepseek_v4": [(128, 8), (128, 8)],  # windows and compressed entries turn at two bases
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_of_a_family(name: str) -> None:
    assert tables(CASES[name]) == FAMILIES[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.1-8b", [(131_072, 128)]),
        ("phi-2", [(2048, 32)]),  # heads of 80, 0.4 of each
        ("phi-4-mini", [(4096 + 131_072, 96)]),  # longrope; heads of 128, 0.75 of each
        ("minimax-m2.5", [(196_608, 64)]),  # rotary_dim 64 of heads of 128
        ("minimax-m2.5-nvfp4", [(196_608, 64)]),  # the same, as a factor of 0.5
        ("deepseek-v3", [(4096 * 40, 64)]),  # YaRN: 4,096 x 40
        ("gemma-3-27b", [(131_072 * 8, 128), (131_072, 128)]),  # linear by 8 where all is seen
        ("gemma-3-1b", [(32_768, 256), (32_768, 256)]),  # two bases, no scaling
        ("mimo-v2-flash", [(262_144, 64)]),  # heads of 192, 0.334 of each
    ],
)
def test_tables_of_published_models(name: str, expected: Tables) -> None:
    spec = resolve(name)
    assert [(table.rows, table.width) for table in spec.rope_tables] == expected
    assert spec.rope_bytes("bf16") == 2 * sum(rows * width for rows, width in expected)
    assert spec.rope_bytes("fp32") == 2 * spec.rope_bytes("bf16")


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, UnknownArchitecture, "spiral"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, UnknownArchitecture, "rotary scaling"),
        ({"rope_scaling": "yarn"}, ModelError, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ModelError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, ModelError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 9e8}}, ModelError, "rotary table"),
        ({"rotary_dim": -1}, ModelError, "rotary_dim"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0.5}},
         ModelError, "original_max_position_embeddings"),
    ],
)  # fmt: skip
def test_a_scaling_that_cannot_be_true(
    settings: dict[str, Any], error: type[ModelError], says: str
) -> None:
    with pytest.raises(error, match=says):
        tables(case("llama", **settings))


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.sampled_from(["linear", "dynamic", "yarn"]))
def test_rows_never_fall_with_the_factor(one: float, other: float, kind: str) -> None:
    low, high = sorted((one, other))
    settings = {"rope_type": kind, "original_max_position_embeddings": 16}
    few, many = (
        tables(case("llama", rope_scaling={**settings, "factor": factor}))[0]
        for factor in (low, high)
    )
    assert 16 <= few[0] <= many[0]
    assert few[1] == many[1] == 16


def test_a_model_without_tables_keeps_none() -> None:
    spec = spec_from_config(CASES["gpt2"])
    assert spec.rope_bytes("bf16") == 0
