"""Which layers have experts, states, windows and indexers, and lists of layers that cannot be."""

from typing import Any

import pytest
from family_cases import CASES, KIMI, case
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import ModelError, UnknownArchitecture
from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec


def layers(spec: ModelSpec, part: str) -> list[int]:
    """The layers that have a tensor with `part` in its name."""
    return sorted({layer for t in spec.tensors if part in t.name for layer in t.layers})


def changed(name: str, **changes: Any) -> ModelSpec:
    return spec_from_config({**CASES[name], **changes})


@pytest.mark.parametrize(
    ("name", "changes", "sparse"),
    [
        ("mixtral", {}, [0, 1, 2, 3, 4, 5, 6]),
        ("qwen2_moe", {"decoder_sparse_step": 3}, [2, 5]),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3, 6]}, [1, 5]),
        ("qwen2_moe", {"decoder_sparse_step": 8}, []),
        ("qwen3_moe", {"mlp_only_layers": list(range(7))}, []),
        ("deepseek_v3", {"first_k_dense_replace": 5}, [5, 6]),
        ("deepseek_v3", {"first_k_dense_replace": 0}, [0, 1, 2, 3, 4, 5, 6]),
        ("deepseek_v3", {"first_k_dense_replace": 7}, []),
        ("deepseek_v3", {"moe_layer_freq": [0, 1, 0, 1, 0, 1, 0]}, [1, 3, 5]),
        ("deepseek_v3", {"mlp_layer_types": ["dense"] * 6 + ["sparse"]}, [6]),
        ("llama4", {"interleave_moe_layer_step": 3}, [2, 5]),
        ("llama4", {"moe_layers": [1, 4]}, [1, 4]),
        ("nemotron_h", {}, [1, 5]),
        ("kimi_linear", {}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_which_layers_have_experts(name: str, changes: dict[str, Any], sparse: list[int]) -> None:
    spec = changed(name, **changes)
    assert {t.layers for t in spec.tensors if t.role == "expert"} == {tuple(sparse)} - {()}
    assert (spec.active_parameters < spec.parameters) is bool(sparse)


@given(st.integers(1, 6), st.integers(1, 6))
def test_what_a_token_does_not_go_through(active: int, more: int) -> None:
    """Three matrices of 20 x 64 an expert, on seven layers."""
    few = changed("qwen3_moe", num_experts_per_tok=active)
    assert few.parameters - few.active_parameters == 7 * (6 - active) * 3 * 20 * 64
    if active + more <= 6:
        many = changed("qwen3_moe", num_experts_per_tok=active + more)
        assert many.parameters == few.parameters
        assert many.intermediate_size - few.intermediate_size in range(more * 20 + 1)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts": 1 << 17}, "num_experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("deepseek_v3", {"moe_layer_freq": [1, 0]}, "marks 2 of 7 layers"),
        ("deepseek_v3", {"moe_layer_freq": [2] * 7}, "marks 7 of 7 layers"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"mlp_layer_types": ["dense"]}, "1 mlp_layer_types for 7 layers"),
        ("deepseek_v3", {"qk_rope_head_dim": -8}, "qk_rope_head_dim"),
        ("glm_moe_dsa", {"index_topk_pattern": "FSS"}, "index_topk_pattern"),
        ("nemotron_h-latent", {"hybrid_override_pattern": "MEMX*ME"}, "hybrid_override_pattern"),
        ("deepseek_v4", {"compress_ratios": [0, 4, 128]}, "compress_ratios"),
        ("deepseek_v4", {"compress_ratios": [0, 4, 64, 4]}, "compress_ratios"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1]}, "marks 2 of 7 layers"),
    ],
)
def test_layers_and_experts_that_cannot_be(name: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        changed(name, **changes)


@pytest.mark.parametrize(
    ("whole", "rest"),
    [([4, 7], [1, 2, 3, 5]), ([4, 7], [1, 2, 3, 4, 5, 6]), ([0, 4], [1, 2, 3, 5, 6]), ([8], [])],
)
def test_kimis_lists_place_every_layer_once(whole: list[int], rest: list[int]) -> None:
    nested = KIMI["linear_attn_config"] | {"full_attn_layers": whole, "kda_layers": rest}
    with pytest.raises(ModelError, match=r"place every layer once|full_attn_layers"):
        spec_from_config(case("kimi_linear", KIMI, linear_attn_config=nested))


@pytest.mark.parametrize(
    ("changes", "indexed"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 3}, [0, 1, 2, 4, 6]),
        ({"index_topk_freq": 4}, [0, 1, 5]),
        ({"indexer_types": ["full"] + ["shared"] * 6}, [0]),
    ],
)
def test_an_indexers_key_is_kept_where_there_is_an_indexer(
    changes: dict[str, Any], indexed: list[int]
) -> None:
    spec = changed("glm_moe_dsa", **changes)
    assert layers(spec, "indexer.wk.") == indexed
    # a latent of 24 and 8 rotary numbers, and a key of 10
    assert [n for n, cache in enumerate(spec.caches) if cache.width == 24 + 8 + 10] == indexed
    assert {cache.width for cache in spec.caches} <= {32, 42}


def test_mimos_published_window_does_not_count_the_query() -> None:
    spec = changed("mimo_v2_flash")
    assert spec.windows == (None, 17, 17, 17, 17, None, 17)
    # keys of 16 and values of 12: 2 heads where all is seen, 4 where it slides
    assert [cache.width for cache in spec.caches[:2]] == [2 * 28, 4 * 28]
    sink = next(t for t in spec.tensors if "attention_sink_bias" in t.name)
    assert sink.layers == (1, 2, 3, 4, 6)


def test_a_hybrids_layers_keep_either_a_state_or_entries() -> None:
    for name in ("qwen3_next", "qwen3_5", "kimi_linear", "nemotron_h"):
        caches = changed(name).caches
        assert all(not (cache.width and cache.state_bytes) for cache in caches)
        assert any(cache.width for cache in caches)
        assert any(cache.state_bytes for cache in caches)
    # Falcon H1 has both in each
    assert all(cache.width and cache.state_bytes for cache in changed("falcon_h1").caches)


def test_a_state_is_in_fp32_and_a_convolution_in_the_models_dtype() -> None:
    narrow, wide = (changed("qwen3_5", dtype=d) for d in ("bfloat16", "float32"))
    states = sum(1 for cache in narrow.caches if cache.state_bytes)
    columns = 2 * 2 * 8 + 4 * 12  # keys and queries of 2 heads x 8, values of 4 x 12
    assert wide.state_bytes - narrow.state_bytes == states * columns * 4 * 2
    assert narrow.state_bytes == states * (columns * 4 * 2 + 4 * 8 * 12 * 4)


def test_what_has_no_arithmetic_is_not_guessed() -> None:
    for name, key in (("kimi_linear", "mla_use_output_gate"), ("mimo_v2_flash", "attention_bias")):
        with pytest.raises(UnknownArchitecture, match=key):
            changed(name, **{key: True})
