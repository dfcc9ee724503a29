"""Folders of every kind of checkpoint: what is stored is what the config asks for, to the byte."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ullage.errors import ModelError
from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.sources import resolve

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "head_dim": 32,
}  # fmt: skip
OSS = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 32}
V3 = {
    **LLAMA, "model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "num_key_value_heads": 4,
}  # fmt: skip
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
BLOCK = {"quant_method": "fp8", "weight_block_size": [32, 32]}

Weights = dict[str, torch.Tensor]


def compressed(weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def fp8(module: str, rows: int, columns: int) -> Weights:
    return {
        f"{module}.weight": torch.zeros(rows, columns, dtype=torch.float8_e4m3fn),
        f"{module}.weight_scale_inv": torch.zeros(rows // 32, columns // 32),
    }


def awq(module: str, rows: int, columns: int) -> Weights:
    return {
        f"{module}.qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(columns // 32, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.zeros(columns // 32, rows, dtype=torch.bfloat16),
    }


def packed(module: str, rows: int, columns: int) -> Weights:
    return {
        f"{module}.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        f"{module}.weight_scale": torch.zeros(rows, columns // 32, dtype=torch.bfloat16),
    }


def int8(module: str, rows: int, columns: int) -> Weights:
    return {
        f"{module}.weight": torch.zeros(rows, columns, dtype=torch.int8),
        f"{module}.weight_scale": torch.zeros(rows, 1, dtype=torch.bfloat16),
    }


def nvfp4(module: str, rows: int, columns: int) -> Weights:
    return {
        f"{module}.weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        f"{module}.weight_scale": torch.zeros(rows, columns // 16, dtype=torch.float8_e4m3fn),
    }


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "fp8": (LLAMA, BLOCK, fp8),
    "awq": (LLAMA, {"quant_method": "awq", "bits": 4, "group_size": 32}, awq),
    "w4a16": (LLAMA, compressed(INT4), packed),
    "w8a8": (LLAMA, compressed(INT8), int8),
    "nvfp4": (LLAMA, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "experts in fp8": (MOE, BLOCK, fp8),
    "experts in w4a16": (MOE, compressed(INT4), packed),
    "latents in fp8": (V3, BLOCK, fp8),
}


def files(spec: ModelSpec, make: Any = None) -> Weights:
    """The weights of a checkpoint, quantized ones as `make` stores them."""
    stored: Weights = {}
    for tensor, name in named(spec):
        if tensor.storage is None:
            stored[name] = torch.zeros(tensor.stored_shape, dtype=torch.bfloat16)
        else:
            stored |= make(name.removesuffix(".weight"), *tensor.shape)
    return stored


def named(spec: ModelSpec) -> Iterator[tuple[TensorSpec, str]]:
    return ((tensor, name) for tensor in spec.tensors for name in tensor.names())


def write(folder: Path, config: dict[str, Any], weights: Weights) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_folder_is_read_to_the_byte(tmp_path: Path, name: str) -> None:
    base, quantization, make = FORMATS[name]
    config = {**base, "quantization_config": quantization}
    weights = files(spec_from_config(config), make)
    spec = resolve(write(tmp_path, config, weights))
    assert spec.checkpoint_bytes == sum(w.nbytes for w in weights.values())
    assert spec.checkpoint_bytes == spec.weights_bytes("bf16")
    assert (spec.dtype, spec.prequantized) == ("bf16", True)
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_module_that_is_missing(tmp_path: Path, name: str) -> None:
    base, quantization, make = FORMATS[name]
    config = {**base, "quantization_config": quantization}
    weights = files(spec_from_config(config), make)
    module = next(m for m in weights if "layers.1." in m and ("down_proj" in m)).rpartition(".")[0]
    left = {key: value for key, value in weights.items() if not key.startswith(f"{module}.")}
    with pytest.raises(ModelError, match=f"lacks {module}"):
        resolve(write(tmp_path, config, left))


@pytest.mark.parametrize("name", FORMATS)
def test_a_module_without_its_scales(tmp_path: Path, name: str) -> None:
    base, quantization, make = FORMATS[name]
    config = {**base, "quantization_config": quantization}
    weights = files(spec_from_config(config), make)
    scales = [key for key in weights if "layers.1." in key and "down_proj.weight_scale" in key]
    scales += [key for key in weights if "layers.1." in key and "down_proj.scales" in key]
    del weights[scales[0]]
    with pytest.raises(ModelError, match=r"lacks a part of .*down_proj"):
        resolve(write(tmp_path, config, weights))


def test_an_eight_bit_weight_of_another_shape(tmp_path: Path) -> None:
    config = {**LLAMA, "quantization_config": BLOCK}
    weights = files(spec_from_config(config), fp8)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"up_proj\.weight is \[8, 8\]"):
        resolve(write(tmp_path, config, weights))


def test_gpt_oss_in_blocks(tmp_path: Path) -> None:
    config = {**OSS, "quantization_config": {"quant_method": "mxfp4"}}

    def blocks(module: str, columns: int, rows: int) -> Weights:
        return {
            f"{module}_blocks": torch.zeros(4, rows, columns // 32, 16, dtype=torch.uint8),
            f"{module}_scales": torch.zeros(4, rows, columns // 32, dtype=torch.uint8),
        }

    spec = resolve(write(tmp_path, config, files(spec_from_config(config), blocks)))
    assert spec.checkpoint_bytes == spec.weights_bytes("bf16")


def test_what_predicts_ahead_is_not_counted(tmp_path: Path) -> None:
    weights = files(spec_from_config(V3))
    whole = sum(weight.nbytes for weight in weights.values())
    weights["model.layers.2.mlp.gate.weight"] = torch.zeros(4, 128)
    weights["mtp.norm.weight"] = torch.zeros(4)
    assert resolve(write(tmp_path, V3, weights)).checkpoint_bytes == whole
    weights["model.layers.3.mlp.gate.weight"] = torch.zeros(4, 128)
    with pytest.raises(ModelError, match=r"holds model\.layers\.3"):
        resolve(write(tmp_path, V3, weights))


def test_experts_may_be_fused(tmp_path: Path) -> None:
    weights = files(spec_from_config(MOE))
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        for key in [key for key in weights if key.startswith(block)]:
            del weights[key]
        weights[f"{block}.gate_up_proj"] = torch.zeros(4, 128, 128, dtype=torch.bfloat16)
        weights[f"{block}.down_proj"] = torch.zeros(4, 128, 64, dtype=torch.bfloat16)
    spec = resolve(write(tmp_path, MOE, weights))
    assert spec.checkpoint_bytes == spec.weights_bytes("bf16")
    weights["model.layers.1.mlp.experts.down_proj"] = torch.zeros(4, 128, 63)
    with pytest.raises(ModelError, match=r"experts\.down_proj is"):
        resolve(write(tmp_path, MOE, weights))


@pytest.mark.parametrize("config", [MOE, OSS, V3], ids=["moe", "oss", "v3"])
def test_what_transformers_saves_is_read(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**config, "pad_token_id": None}
    settings["dtype"] = settings.pop("torch_dtype")
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(hf_config)
    model.save_pretrained(tmp_path)
    spec = resolve(str(tmp_path))
    assert spec.checkpoint_bytes is not None
    assert spec.parameters == spec_from_config(config).parameters


def test_an_unknown_encoder_is_known_from_its_files(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}}
    assert spec_from_config(config).encoder_gap
    weights = files(spec_from_config(config))
    weights["vision_tower.patch.weight"] = torch.zeros(3, 5)
    spec = resolve(write(tmp_path, config, weights))
    assert spec.encoder_bytes("bf16") == 30
    assert spec.checkpoint_bytes == spec.weights_bytes("bf16")


def test_modelopt_may_say_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    settings = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    weights = files(spec_from_config({**LLAMA, "quantization_config": settings}), nvfp4)
    folder = write(tmp_path, LLAMA, weights)
    with pytest.raises(ModelError):
        resolve(folder)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    assert resolve(folder).prequantized
