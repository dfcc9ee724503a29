"""Models with vision: the text part is exact, the encoder is listed or says why not."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
from family_cases import DELTA, MLA, MOE, SHARED

from ullage.errors import ModelError, UnknownArchitecture
from ullage.specs.families import spec_from_config
from ullage.specs.families.wrappers import WRAPPERS
from ullage.specs.model import ModelSpec

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 100, "max_position_embeddings": 128, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN = {
    "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 4, "out_hidden_size": 64,
    "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    "num_position_embeddings": 16,
}  # fmt: skip
DEEP = {**QWEN, "deepstack_visual_indexes": [0, 1]}
GEMMA4_TOWER = {
    "model_type": "gemma4_vision", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6,
    "patch_size": 4, "position_embedding_size": 50, "standardize": True,
}  # fmt: skip
LLAMA4_TOWER = {
    **TOWER, "model_type": "llama4_vision_model", "vision_output_dim": 30,
    "projector_input_dim": 30, "projector_output_dim": 30,
}  # fmt: skip


def wrapped(kind: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "text_config": {**TEXT, **text},
        "vision_config": vision,
        **more,
    }


SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
CASES: dict[str, dict[str, Any]] = {
    "gemma3": wrapped("gemma3", {"model_type": "gemma3_text"}, SIGLIP),
    "gemma3-no-head": wrapped("gemma3", {}, {**SIGLIP, "vision_use_head": False}),
    "gemma4": wrapped(
        "gemma4",
        {"model_type": "gemma4_text", "global_head_dim": 32, "hidden_size_per_layer_input": 0},
        GEMMA4_TOWER,
        audio_config=None,
    ),
    "mistral3": wrapped(
        "mistral3", {"model_type": "mistral"}, {**TOWER, "model_type": "pixtral", "head_dim": 6}
    ),
    "mistral3-ministral": wrapped(
        "mistral3",
        {"model_type": "ministral3", "tie_word_embeddings": True},
        {**TOWER, "model_type": "pixtral", "head_dim": 6},
        spatial_merge_size=3,
        multimodal_projector_bias=True,
    ),
    "qwen3_vl": wrapped("qwen3_vl", {"model_type": "qwen3_vl_text"}, DEEP),
    "qwen3_vl_moe": wrapped("qwen3_vl_moe", {"model_type": "qwen3_vl_moe_text", **MOE}, DEEP),
    "qwen3_5": wrapped("qwen3_5", {"model_type": "qwen3_5_text", **DELTA}, QWEN),
    "qwen3_5_moe": wrapped(
        "qwen3_5_moe", {"model_type": "qwen3_5_moe_text", **DELTA, **MOE, **SHARED}, QWEN
    ),
    "qwen2_5_vl": wrapped("qwen2_5_vl", {"model_type": "qwen2_5_vl_text"}, QWEN),
    "llama4": wrapped(
        "llama4",
        {"model_type": "llama4_text", "num_local_experts": 3, "intermediate_size_mlp": 120},
        LLAMA4_TOWER,
    ),
    "llava": wrapped(
        "llava", {"model_type": "llama"}, {**TOWER, "model_type": "clip_vision_model"}
    ),
    "llava_next": wrapped(
        "llava_next", {"model_type": "granite"}, SIGLIP, vision_feature_layer=[-1, -2]
    ),
    "minimax_m3_vl": wrapped(
        "minimax_m3_vl",
        {
            "intermediate_size": 20,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 28,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [0, 1],
            "pad_token_id": None,
            "sparse_attention_config": {
                "sparse_index_dim": 10,
                "sparse_num_index_heads": 3,
                "sparse_block_size": 8,
                "sparse_topk_blocks": 4,
                "sparse_attention_freq": [0, 1],
            },
        },
        {
            **TOWER,
            "projection_dim": 64,
            "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        projector_hidden_size=48,
    ),
    "kimi_k25": wrapped(
        "kimi_k25",
        {"model_type": "kimi_k2", **MLA, "num_key_value_heads": 4, "head_dim": None},
        {
            "vt_hidden_size": 1152,
            "vt_intermediate_size": 4304,
            "vt_num_hidden_layers": 27,
            "vt_num_attention_heads": 16,
            "patch_size": 14,
        },
    ),
}


def checkpoint(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    tensors = (*spec.tensors, *spec.encoder)
    return {name: tensor.stored_shape for tensor in tensors for name in tensor.names()}


def text_name(name: str) -> str:
    name = name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
    # transformers renames Kimi's text layers too when it saves, which the published file does not
    return name.replace("model.blocks", "model.layers").replace("model.mm_proj", "mm_proj")


def test_every_wrapper_has_a_case() -> None:
    assert {case["model_type"] for case in CASES.values()} | {"kimi_vl"} == set(WRAPPERS)


def test_kimi_vl_is_kimi_in_other_words() -> None:
    tower = CASES["kimi_k25"]["vision_config"]
    plain = {key.removeprefix("vt_"): value for key, value in tower.items()}
    other = {**CASES["kimi_k25"], "model_type": "kimi_vl", "vision_config": plain}
    assert spec_from_config(other) == spec_from_config(CASES["kimi_k25"])


@pytest.mark.parametrize("case", CASES)
def test_text_and_encoder_are_those_of_transformers(
    case: str,
    hf_model: Callable[[dict[str, Any]], Any],
    hf_shapes: Callable[[Any], dict[str, tuple[int, ...]]],
) -> None:
    spec = spec_from_config(CASES[case])
    theirs = {text_name(name): shape for name, shape in hf_shapes(hf_model(CASES[case])).items()}
    theirs = {
        name.replace("encoder.patch_embed", "patch_embed"): shape for name, shape in theirs.items()
    }
    if spec.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    ours = checkpoint(spec)
    assert not spec.encoder_gap
    if case == "qwen3_vl_moe":  # transformers turns the experts of the published file round
        assert {name: sorted(shape) for name, shape in ours.items()} == {
            name: sorted(shape) for name, shape in theirs.items()
        }
    else:
        assert ours == theirs


@pytest.mark.parametrize("case", CASES)
def test_the_encoder_is_no_part_of_the_parameters(case: str) -> None:
    spec = spec_from_config(CASES[case])
    assert spec.parameters == sum(prod(t.shape) * t.count for t in spec.tensors)
    assert spec.encoder_bytes("bf16") == 2 * sum(t.elements * t.count for t in spec.encoder) > 0
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_only_gemma3_runs() -> None:
    assert [case for case in CASES if spec_from_config(CASES[case]).runs] == [
        "gemma3",
        "gemma3-no-head",
    ]


def test_a_flat_qwen_is_its_own_text_model() -> None:
    nested = spec_from_config(CASES["qwen2_5_vl"])
    flat = {**TEXT, "model_type": "qwen2_5_vl", "vision_config": QWEN}
    assert spec_from_config(flat) == nested


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"vision_config": None}, "no vision_config"),
        ({"vision_config": "siglip"}, "no vision_config"),
        ({"vision_config": {"hidden_size": -1}}, "hidden_size"),
        ({"vision_config": {**TOWER, "num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"audio_config": {"model_type": "x"}}, "audio"),
    ],
)
def test_an_unknown_encoder_fails_only_where_it_counts(change: dict[str, Any], why: str) -> None:
    spec = spec_from_config({**CASES["gemma3"], **change})
    assert spec.parameters == spec_from_config(CASES["gemma3"]).parameters
    assert why in spec.encoder_gap
    with pytest.raises(UnknownArchitecture, match=why):
        spec.encoder_bytes("bf16")


def test_an_unknown_tower_is_named() -> None:
    case = {**CASES["llava_next"], "vision_config": {**TOWER, "model_type": "eva"}}
    assert "eva" in spec_from_config(case).encoder_gap


@pytest.mark.parametrize("text", [None, "gemma", [], {"model_type": 7}])
def test_a_garbled_text_config(text: object) -> None:
    with pytest.raises(ModelError):
        spec_from_config({**CASES["gemma3"], "text_config": text})


def test_quantization_inside_the_text_config() -> None:
    settings = {"quant_method": "fp8", "ignored_layers": ["model.language_model.layers.1"]}
    config = CASES["mistral3"]
    inner = {**config["text_config"], "quantization_config": settings}
    spec = spec_from_config({**config, "text_config": inner})
    stored = {layer for t in spec.tensors if t.storage for layer in t.layers}
    assert stored == {0}
    assert all(tensor.storage is None for tensor in spec.encoder)
