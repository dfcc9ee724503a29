"""Bytes of quantized checkpoints, scales and zeros included."""

import time
from contextlib import suppress
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import ModelError, UllageError
from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec, Storage, TensorSpec
from ullage.specs.patterns import Patterns
from ullage.specs.quantized import CHECKPOINT_FORMATS, apply, as_checkpoint, read_quantization

CONFIG = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "torch_dtype": "bfloat16",
}  # fmt: skip
LINEAR = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256  # numbers in a layer's projections
ROWS = 2 * 256 + 2 * 128 + 2 * 512 + 256
COLUMNS = 6 * 256 + 512


def spec_with(quantization: dict[str, Any]) -> ModelSpec:
    return spec_from_config(CONFIG | {"quantization_config": quantization})


def quantized_bytes(spec: ModelSpec) -> int:
    """Bytes of a layer's projections."""
    return sum(
        tensor.stored_bytes("bf16") * tensor.count // 3
        for tensor in spec.tensors
        if tensor.role == "linear"
    )


def compressed(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "fp8, a scale a tensor": ({"quant_method": "fp8"}, LINEAR + 7 * 4),
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        LINEAR + LINEAR / 128 / 128 * 4,
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, LINEAR + ROWS * 4),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, LINEAR / 2 + LINEAR / 128 * 2.5),
    "gptq, 8 bits, a group a row": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
        LINEAR + ROWS * 3,
    ),
    "gptq in the order of activations": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
        LINEAR / 2 + LINEAR / 128 * 2.5 + COLUMNS * 4,
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 2, "group_size": 64},
        LINEAR / 4 + LINEAR / 64 * 2.25,
    ),
    "w8a8": (compressed(num_bits=8, type="int", strategy="channel"), LINEAR + ROWS * 2),
    "fp8 dynamic": (compressed(num_bits=8, type="float", strategy="channel"), LINEAR + ROWS * 2),
    "w4a16": (
        compressed(num_bits=4, type="int", strategy="group", group_size=128),
        LINEAR / 2 + LINEAR / 128 * 2,
    ),
    "w4a16 with zeros": (
        compressed(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        LINEAR / 2 + LINEAR / 32 * 2.5,
    ),
    "nvfp4": (
        compressed(num_bits=4, type="float", strategy="tensor_group", group_size=16),
        LINEAR / 2 + LINEAR / 16,
    ),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        LINEAR / 2 + LINEAR / 16,
    ),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, LINEAR + 7 * 4),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        LINEAR / 2 + LINEAR / 64 * (1 + 4 / 256),
    ),
    "bitsandbytes int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        LINEAR + ROWS * 4,
    ),
    "mxfp4 without experts": ({"quant_method": "mxfp4"}, LINEAR * 2),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_numbers_and_their_scales(method: str) -> None:
    settings, expected = METHODS[method]
    assert quantized_bytes(spec_with(settings)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_embedding_head_and_norms_stay(method: str) -> None:
    spec, plain = spec_with(METHODS[method][0]), spec_from_config(CONFIG)
    kept = [tensor for tensor in spec.tensors if tensor.role != "linear"]
    assert kept == [tensor for tensor in plain.tensors if tensor.role != "linear"]
    assert spec.parameters == plain.parameters


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("model.layers.1.mlp.down_proj", (1,)),
        ("model.layers.1", (1,)),
        ("model.layers.*.mlp.down_proj", (0, 1, 2)),
        ("re:.*layers\\.[12]\\..*down.*", (1, 2)),
        ("down_proj", (0, 1, 2)),
        ("model.layers.1.mlp.down", ()),
        ("model.layers.11", ()),
        ("lm_head", ()),
    ],
)
def test_ignored_weights_keep_their_dtype(pattern: str, layers: tuple[int, ...]) -> None:
    spec = spec_with({"quant_method": "fp8", "modules_to_not_convert": [pattern]})
    plain = [
        tensor.layers
        for tensor in spec.tensors
        if "down_proj" in tensor.name and tensor.storage is None
    ]
    assert plain == ([layers] if layers else [])


def test_only_experts_of_gpt_oss_are_quantized() -> None:
    quantized = read_quantization({"quantization_config": {"quant_method": "mxfp4"}})
    assert quantized is not None
    expert = TensorSpec("layers.{}.experts.{}.up.weight", (64, 32), "expert", (0, 1), copies=4)
    linear = TensorSpec("layers.{}.q_proj.weight", (64, 32), "linear", (0, 1))
    stored = list(apply(quantized, [expert, linear]))
    assert [tensor.storage is None for tensor in stored] == [False, True]
    assert stored[0].stored_bytes("bf16") == 64 * 32 // 2 + 64


@pytest.mark.parametrize("name", CHECKPOINT_FORMATS)
def test_a_format_that_was_given_is_told_from_the_checkpoints_own(name: str) -> None:
    given = as_checkpoint(spec_from_config(CONFIG), name)
    assert ModelSpec.from_json(given.to_json()).converted == name
    assert spec_with({"quant_method": "fp8"}).converted == ""
    with pytest.raises(ModelError, match="quantized already"):
        as_checkpoint(given, name)


@given(
    st.integers(1, 500), st.integers(1, 500), st.sampled_from([2, 4, 8]), st.integers(0, 128),
    st.integers(0, 128),
)  # fmt: skip
def test_storage_counts_whole_groups(
    rows: int, columns: int, bits: int, group_rows: int, group_columns: int
) -> None:
    storage = Storage("x", bits, group_rows, group_columns, 2.0)
    groups = ceil(rows / (group_rows or rows)) * ceil(columns / (group_columns or columns))
    assert storage.nbytes((rows, columns)) == ceil(rows * columns * bits / 8 + 2 * groups)
    assert storage.nbytes((7, rows, columns)) == 7 * storage.nbytes((rows, columns))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "wishful"},
        {"bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "awq", "bits": 4, "group_size": "many"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}},
        {"quant_method": "modelopt", "quant_algo": "W1A1"},
        [1],
    ],
)
def test_what_is_unknown_is_never_guessed(settings: Any) -> None:
    with pytest.raises(ModelError):
        spec_from_config(CONFIG | {"quantization_config": settings})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 200) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.sampled_from(["fp8", "awq", "compressed-tensors", "modelopt", "bitsandbytes", "mxfp4"]),
    st.dictionaries(
        st.sampled_from(
            ["bits", "group_size", "ignore", "config_groups", "weight_block_size", "quant_algo",
             "modules_to_not_convert", "llm_int8_skip_modules", "load_in_8bit"]
        ),
        json_values,
    ),
)  # fmt: skip
def test_nothing_but_our_own_errors_comes_out(method: str, settings: dict[str, Any]) -> None:
    with suppress(UllageError):
        spec_with({**settings, "quant_method": method})


def storages(spec: ModelSpec) -> dict[str, str]:
    """The last part of each weight's name, and its storage."""
    named = {tensor.name.split(".")[-2]: tensor.storage for tensor in spec.tensors}
    return {name: storage.name for name, storage in named.items() if storage is not None}


def test_groups_by_name_go_before_the_class() -> None:
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": fp8},
            "b": {"targets": ["re:.*down_proj$"], "weights": int4},
        },
        "ignore": ["lm_head", "re:.*q_proj"],
    }
    found = storages(spec_with(settings))
    assert found.pop("down_proj") == "int4"
    assert "q_proj" not in found
    assert set(found.values()) == {"fp8"}


def test_mixed_precision_names_each_module() -> None:
    layers = {
        "model.layers.*.mlp.up_proj": {"quant_algo": "W4A16_NVFP4"},
        "model.layers.1.self_attn.q_proj": {"quant_algo": "FP8"},
        "lm_head": {"quant_algo": "FP8"},
    }
    settings = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    spec = spec_with(settings)
    assert storages(spec) == {"up_proj": "nvfp4", "q_proj": "fp8", "lm_head": "fp8"}
    assert [t.layers for t in spec.tensors if t.storage and "q_proj" in t.name] == [(1,)]


@pytest.mark.parametrize(
    "pattern",
    ["re:.*language_model.*up_proj", "re:^language_model\\.model\\..*up_proj",
     "model.language_model.layers.*up_proj", "language_model.model.layers.1.mlp.up_proj"],
)  # fmt: skip
def test_names_of_a_wrapped_model(pattern: str) -> None:
    spec = spec_with({"quant_method": "fp8", "ignored_layers": [pattern]})
    assert 1 in next(t.layers for t in spec.tensors if "up_proj" in t.name and t.storage is None)


def test_stacked_experts_are_quantized() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = {**CONFIG, "model_type": "gpt_oss", **experts, "quantization_config": settings}
    stored = {t.name: t for t in spec_from_config(config).tensors if t.storage is not None}
    assert {name.rpartition(".")[2] for name in stored} == {"gate_up_proj", "down_proj"}
    for tensor in stored.values():
        assert tensor.stored_bytes("bf16") == tensor.elements // 2 + tensor.elements // 32


@pytest.mark.parametrize(
    "pattern",
    [
        "re:(",
        "re:" + "(" * 900,
        "re:(.|.)*x",
        "re:" + ".*" * 9 + "x",
        "re:" + "a" * 2000,
        "*".join("abcdefghij"),
    ],
)
def test_a_garbled_pattern(pattern: str) -> None:
    with pytest.raises(ModelError, match="pattern"):
        spec_with({"quant_method": "fp8", "ignored_layers": [pattern]})


@pytest.mark.parametrize("pattern", ["re:.*.*.*.*.*.*Z", "re:" + ".?" * 30 + "Z"])
def test_a_pattern_that_would_take_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(ModelError, match="odd pattern"):
        spec_with({"quant_method": "fp8", "ignored_layers": [pattern]})


@pytest.mark.parametrize("pattern", ["re:.*.*.*.*Z", r"re:.*(?:up|down)?_proj.*?x", "*a*b*c*d"])
def test_the_slowest_that_is_not_refused_is_quick(pattern: str) -> None:
    matches = Patterns([pattern]).matches
    begun = time.process_time()
    assert not matches("model.layers.10.block_sparse_moe.experts.117.down_proj")
    assert time.process_time() - begun < 0.5
