"""Quantized checkpoints whose config, headers and weights do not agree; GGUF metadata of the wrong
types."""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.errors import ModelError, UllageError
from ullage.specs.families import spec_from_config
from ullage.specs.gguf import GGUFHeader, GGUFTensor
from ullage.specs.gguf_model import config_from_gguf
from ullage.specs.quantized import read_quantization
from ullage.specs.sources import resolve

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
BLOCK = {"quant_method": "fp8", "weight_block_size": [32, 32]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I8": 1, "I32": 4}

Tensors = dict[str, tuple[str, list[int]]]


def stored(quantization: dict[str, Any]) -> Tensors:
    """A checkpoint's tensors: fp8 weights with a scale a block, and the rest in bf16."""
    found: Tensors = {}
    for tensor, name in named(quantization):
        if tensor.storage is None:
            found[name] = ("BF16", list(tensor.shape))
        else:
            rows, columns = tensor.shape
            found[name] = ("F8_E4M3", [rows, columns])
            found[f"{name}_scale_inv"] = ("F32", [rows // 32, columns // 32])
    return found


def named(quantization: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    spec = spec_from_config({**LLAMA, "quantization_config": quantization})
    return ((tensor, name) for tensor in spec.tensors for name in tensor.names())


def write(folder: Path, tensors: Tensors, quantization: Any = BLOCK) -> str:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, size = end, BYTES[dtype]
        for side in shape:
            size *= side
        end = begin + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": quantization}))
    return str(folder)


def test_the_checkpoint_is_read_as_it_is(tmp_path: Path) -> None:
    spec = resolve(write(tmp_path, stored(BLOCK)))
    # 2 layers of q, o: 64 x 64, k, v: 32 x 64, and three of 96 x 64; a scale of 4 bytes for 1,024
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    ends, norms = 2 * 50 * 64 * 2, 5 * 64 * 2
    assert spec.checkpoint_bytes == linear + linear // 1024 * 4 + ends + norms
    assert spec.checkpoint_bytes == spec.weights_bytes("bf16")


Q = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_scale_is_a_missing_tensor(tmp_path: Path) -> None:
    left = {name: value for name, value in stored(BLOCK).items() if name != f"{Q}_scale_inv"}
    with pytest.raises(ModelError, match=r"lacks a part of .*q_proj"):
        resolve(write(tmp_path, left))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (Q, ("F8_E4M3", [64, 32]), r"q_proj\.weight is \[64, 32\]"),
        (Q, ("F8_E4M3", [64, 64, 1]), r"q_proj\.weight is"),
        ("model.norm.weight", ("BF16", [65]), r"norm\.weight is \[65\]"),
        ("lm_head.weight", ("F8_E4M3", [50, 63]), r"lm_head\.weight is"),
        (f"{Q}_scale_inv", ("F32", [0]), "lacks a part of .*q_proj"),
        ("model.layers.2.self_attn.q_proj.weight", ("BF16", [64, 64]), r"layers\.2"),
    ],
)
def test_a_tensor_that_is_not_the_configs(
    tmp_path: Path, name: str, value: tuple[str, list[int]], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        resolve(write(tmp_path, {**stored(BLOCK), name: value}))


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "compressed-tensors",
         "config_groups": {"a": {"targets": ["Linear"], "weights": INT4}}, "ignore": []},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ],
    ids=["w4a16", "awq", "nvfp4"],
)  # fmt: skip
def test_a_config_that_calls_fp8_something_of_four_bits(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    """The plan would be of half the bytes that are there."""
    with pytest.raises(ModelError, match="is F8_E4M3, which its config does not say"):
        resolve(write(tmp_path, stored(BLOCK), said))


def test_a_config_that_says_nothing_of_its_scales(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weight_scale_inv"):
        resolve(write(tmp_path, stored(BLOCK), None))


@settings(max_examples=150)
@given(st.data())
def test_a_truncated_quantization_config(data: st.DataObject) -> None:
    """Any key left out, of any depth: our error, or the same settings by default."""
    whole = json.loads(json.dumps(data.draw(st.sampled_from([
        BLOCK, {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {
            "a": {"targets": ["Linear"], "weights": INT4},
            "b": {"targets": ["re:.*q_proj"], "weights": {**INT4, "num_bits": 8}}}},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
         "quantized_layers": {"model.layers.0.mlp.up_proj": {"quant_algo": "FP8"}}},
    ]))))  # fmt: skip
    place = whole
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        del place[key]
        break
    with suppress(UllageError):
        found = read_quantization({"quantization_config": whole})
        assert found is None or all(rule.storage.bits > 0 for rule in found.rules)


METADATA = {
    "block_count": 7, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 100,
    "attention.key_length": 16, "attention.value_length": 20, "attention.sliding_window": 16,
    "expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 20,
    "expert_shared_count": 1, "leading_dense_block_count": 1, "nextn_predict_layers": 1,
    "attention.kv_lora_rank": 24, "attention.q_lora_rank": 40, "rope.dimension_count": 8,
    "ssm.group_count": 2, "ssm.state_size": 8, "ssm.time_step_rank": 4, "ssm.inner_size": 48,
    "ssm.conv_kernel": 4, "attn_logit_softcapping": 50.0, "full_attention_interval": 2,
}  # fmt: skip
ARCHITECTURES = [
    "llama", "mistral3", "qwen2", "gemma2", "gemma3", "gpt2", "olmo2", "falcon", "qwen2moe",
    "gpt-oss", "glm4moe", "minimax-m2", "deepseek2", "qwen3next", "qwen35", "qwen35moe", "phimoe",
]  # fmt: skip
WRONG: list[Any] = [
    None, True, -1, 0, 1.5, float("nan"), 10**30, "64", b"64", [], [8, 8], [None], {"a": 1},
    GGUFTensor("x", (1,), "F32", 0, 4),
]  # fmt: skip


def header(arch: Any, **changes: Any) -> GGUFHeader:
    words = {f"{arch}.{key}": value for key, value in {**METADATA, **changes}.items()}
    tensors = tuple(GGUFTensor(name, (1,), "F32", 0, 4) for name in ("output.weight", "blk.0.x"))
    return GGUFHeader(3, {"general.architecture": arch, **words}, tensors)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_metadata_of_a_wrong_type_is_an_error_of_ours(arch: str) -> None:
    spec_from_config(config_from_gguf(header(arch)))
    for key in METADATA:
        for value in WRONG:
            with suppress(UllageError):
                spec = spec_from_config(config_from_gguf(header(arch, **{key: value})))
                assert spec.parameters > 0


@pytest.mark.parametrize("arch", [None, 7, ["llama"], "", "LLAMA", "llama\0"])
def test_an_architecture_that_is_no_name(arch: Any) -> None:
    with pytest.raises(ModelError, match="architecture"):
        config_from_gguf(header(arch))


def test_rotary_numbers_are_no_more_than_a_key_has() -> None:
    with pytest.raises(ModelError, match="qk_nope_head_dim"):
        spec_from_config(config_from_gguf(header("deepseek2", **{"rope.dimension_count": 99})))


def test_layers_ahead_are_no_more_than_there_are() -> None:
    lying = header("glm4moe", nextn_predict_layers=7)
    assert config_from_gguf(lying)["num_hidden_layers"] == 7
    assert config_from_gguf(header("glm4moe"))["num_hidden_layers"] == 6
