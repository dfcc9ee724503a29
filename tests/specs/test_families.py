"""Every family against the model that transformers builds from the same config."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ullage.errors import CheckpointError, ModelError, UnknownArchitecture
from ullage.specs.families import FAMILIES, spec_from_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
GQA = {"num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 100}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama-gqa-tied": {"model_type": "llama", **SIZES, **GQA, "tie_word_embeddings": True},
    "llama-biases": {
        "model_type": "llama", **SIZES, **GQA, "attention_bias": True, "mlp_bias": True,
    },
    "llama-wide-heads": {"model_type": "llama", **SIZES, **GQA, "head_dim": 32},
    "mistral": {"model_type": "mistral", **SIZES, **GQA},
    "mistral-no-window": {"model_type": "mistral", **SIZES, **GQA, "sliding_window": None},
    "mistral-default-kv-heads": {"model_type": "mistral", **SIZES, "num_attention_heads": 8},
    "qwen2": {"model_type": "qwen2", **SIZES, **GQA, "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2", **SIZES, **GQA,
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3,
    },
    "qwen2-window-off": {"model_type": "qwen2", **SIZES, **GQA, "sliding_window": 16},
    "qwen3": {"model_type": "qwen3", **SIZES, **GQA},
    "qwen3-bias-window": {
        "model_type": "qwen3", **SIZES, **GQA, "attention_bias": True, "head_dim": 8,
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0,
    },
    "gemma": {"model_type": "gemma", **SIZES, "num_key_value_heads": 1},
    "gemma-untied": {"model_type": "gemma", **SIZES, **GQA, "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", **SIZES},
    "gemma2-types": {
        "model_type": "gemma2", **SIZES, **GQA, "sliding_window": 16,
        "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 4,
    },
    "gemma3": {"model_type": "gemma3_text", **SIZES, **GQA, "head_dim": 16},
    "gemma3-defaults": {
        "model_type": "gemma3_text",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
    },
    "gemma3-pattern": {"model_type": "gemma3_text", **SIZES, "sliding_window_pattern": 3},
    "phi": {"model_type": "phi", **SIZES},
    "phi-qk-norm": {"model_type": "phi", **SIZES, **GQA, "qk_layernorm": True},
    "phi3": {"model_type": "phi3", **SIZES, **GQA},
    "phi3-window": {"model_type": "phi3", **SIZES, **GQA, "sliding_window": 16},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-inner": {"model_type": "gpt2", **GPT2, "n_inner": 80, "tie_word_embeddings": False},
}  # fmt: skip


def transformers_model(config: dict[str, Any]) -> Any:
    config = {"pad_token_id": None, **config}
    hf_config = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def test_every_family_has_a_case() -> None:
    assert {case["model_type"] for case in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_transformers(case: str) -> None:
    spec = spec_from_config(CASES[case])
    model = transformers_model(CASES[case])
    ours = {
        tensor.name.format(layer): tensor.shape
        for tensor in spec.tensors
        for layer in range(tensor.count)
    }
    theirs = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if spec.tie_embeddings:
        theirs.pop("lm_head.weight")
    assert ours == theirs
    assert spec.parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_roles_are_the_modules_that_quantizers_convert(case: str) -> None:
    spec = spec_from_config(CASES[case])
    model = transformers_model(CASES[case])
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    ours = {
        tensor.name.format(layer)
        for tensor in spec.tensors
        for layer in range(tensor.count)
        if tensor.role == "linear"
    }
    assert ours == linear


@pytest.mark.parametrize("case", CASES)
def test_windows_are_those_of_the_transformers_cache(case: str) -> None:
    spec = spec_from_config(CASES[case])
    cache = DynamicCache(config=transformers_model(CASES[case]).config)
    theirs = [layer.sliding_window if layer.is_sliding else None for layer in cache.layers]
    assert list(spec.windows) == theirs


@pytest.mark.parametrize("case", CASES)
def test_geometry_is_that_of_transformers(case: str) -> None:
    spec = spec_from_config(CASES[case])
    config = transformers_model(CASES[case]).config
    assert spec.num_layers == config.num_hidden_layers
    assert spec.max_context_tokens == config.max_position_embeddings
    assert spec.tie_embeddings is config.tie_word_embeddings
    assert spec.softcap == getattr(config, "attn_logit_softcapping", None)
    assert spec.dtype == "fp32"


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
        {"layer_types": ["full_attention"] * 7},
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
