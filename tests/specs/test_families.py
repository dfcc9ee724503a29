"""Configs that lie, lack a key or need code of their own."""

import math
from typing import Any

import pytest

from ullage.errors import CheckpointError, ModelError, UnknownArchitecture
from ullage.specs.families import RUNNING, spec_from_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "gemma2": {"model_type": "gemma2", **SIZES},
    "gemma3-defaults": {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
    },
    "phi3": {"model_type": "phi3", **SIZES, "num_key_value_heads": 2},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 100,
    },
}


def test_what_the_runtime_has() -> None:
    assert set(RUNNING) == {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        *("phi", "phi3", "gpt2"),
    }


def test_spec_survives_json() -> None:
    spec = spec_from_config(CASES["gemma2"], name="tiny", source="here")
    assert type(spec).from_json(spec.to_json()) == spec


def test_gemma3_with_vision_counts_its_text_model() -> None:
    text = {key: value for key, value in CASES["gemma3-defaults"].items() if key != "model_type"}
    wrapper = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "vision_config": {"hidden_size": 8},
        "text_config": {**text, "model_type": "gemma3_text"},
    }
    spec = spec_from_config(wrapper)
    assert spec.tensors == spec_from_config(CASES["gemma3-defaults"]).tensors
    assert (spec.family, spec.dtype) == ("gemma3_text", "bf16")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize(
    "value", [None, 0, -1, 1.5, "64", True, [64], {}, math.nan, math.inf, 2**31 + 1, 10**400]
)
def test_wrong_values_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=key):
        spec_from_config({**CASES["llama"], key: value})


@pytest.mark.parametrize("value", [None, 7, ["llama"], {}])
def test_a_model_type_that_is_no_name(value: object) -> None:
    with pytest.raises(ModelError, match="model_type"):
        spec_from_config({**CASES["llama"], "model_type": value})


@pytest.mark.parametrize("key", [*SIZES, "model_type"])
def test_missing_keys_are_named(key: str) -> None:
    config = {name: value for name, value in CASES["llama"].items() if name != key}
    with pytest.raises(ModelError, match=key):
        spec_from_config(config)


def test_missing_gpt2_key_is_named_as_gpt2_spells_it() -> None:
    with pytest.raises(ModelError, match="n_embd"):
        spec_from_config({key: value for key, value in CASES["gpt2"].items() if key != "n_embd"})


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2**31},
        {"num_attention_heads": 3},
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"tie_word_embeddings": "yes"},
        {"dtype": "float8_e4m3fn"},
        {"dtype": 16},
        {"layer_types": ["sliding_attention"] * 7},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [7]},
        {"auto_map": ["x"]},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_llama_with_a_lie_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        spec_from_config({**CASES["llama"], **change})


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["linear_attention"] * 7},
        {"layer_types": "full_attention"},
        {"layer_types": [["full_attention"]] * 7},
        {"sliding_window": -4},
        {"attn_logit_softcapping": "50"},
        {"use_bidirectional_attention": True},
    ],
)
def test_gemma2_with_a_lie_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        spec_from_config({**CASES["gemma2"], **change})


def test_unknown_family_is_never_guessed() -> None:
    with pytest.raises(UnknownArchitecture, match="Known: llama, mistral"):
        spec_from_config({**CASES["llama"], "model_type": "mamba"})


def test_other_head_of_a_known_family_is_refused() -> None:
    with pytest.raises(UnknownArchitecture, match="LlamaForSequenceClassification"):
        spec_from_config({**CASES["llama"], "architectures": ["LlamaForSequenceClassification"]})


@pytest.mark.parametrize("model_type", ["llama", "mamba"])
def test_remote_code_is_never_executed(model_type: str) -> None:
    remote = {"AutoModelForCausalLM": "org/repo--modeling_evil.EvilForCausalLM"}
    with pytest.raises(CheckpointError, match="never executes"):
        spec_from_config({**CASES["llama"], "model_type": model_type, "auto_map": remote})


def test_remote_copy_of_the_native_class_is_not_needed() -> None:
    native = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert spec_from_config({**CASES["phi3"], "auto_map": native}).family == "phi3"


def test_a_quantized_checkpoint_keeps_its_geometry() -> None:
    plain = spec_from_config(CASES["llama"])
    fp8 = spec_from_config({**CASES["llama"], "quantization_config": {"quant_method": "fp8"}})
    assert fp8.prequantized
    assert not plain.prequantized
    assert fp8.parameters == plain.parameters
    assert fp8.weights_bytes("fp32") < plain.weights_bytes("fp32")
