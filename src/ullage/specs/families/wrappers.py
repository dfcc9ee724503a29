"""Models that see: a text model inside, whose arithmetic is exact, and an encoder beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ullage.errors import ModelError, UnknownArchitecture
from ullage.specs.config import Config
from ullage.specs.families import dense, rope, vision
from ullage.specs.families.base import Family, Tensors, full
from ullage.specs.model import ModelSpec, TensorSpec

# What the text model takes from around it, where its own config does not say.
_SHARED = (
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "quantization_config",
    "compression_config",
    "architectures",
    "auto_map",
)
# Of one class, not of the text model's: its names are checked outside.
_OUTER = ("architectures", "auto_map")


@dataclass(frozen=True)
class Wrapper:
    """A model_type with a `text_config` inside: its class, the text family where the config does
    not say, and the tensors of its encoder from the `vision_config` (and the whole config).
    `flat` ones were first published with the text model's keys outside."""

    native_class: str
    text_family: str
    encoder: Callable[[ModelSpec, Config, Config], Tensors]
    vision_defaults: Mapping[str, Any]
    runs: bool = False
    flat: bool = False


def text_model(
    config: Mapping[str, Any],
) -> tuple[str, Mapping[str, Any], Wrapper | None]:
    """The text part's family and config, and what wraps it.

    Raises:
        ModelError: no model_type, or a wrapper without a text_config.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            "The model's config has no 'model_type': is it a transformers config.json?"
        )
    wrapper = WRAPPERS.get(model_type)
    if wrapper is None:
        return model_type, config, None
    inner = config.get("text_config")
    if inner is None and wrapper.flat:
        return wrapper.text_family, config, wrapper
    if not isinstance(inner, dict):
        raise ModelError(f"The model's config has no 'text_config', which a {model_type} needs.")
    family = inner.get("model_type", wrapper.text_family)
    if not isinstance(family, str):
        raise ModelError("The model's text_config has a garbled 'model_type'.")
    outer = {key: config[key] for key in _SHARED if key in config}
    return family, {**outer, **{k: v for k, v in inner.items() if k not in _OUTER}}, wrapper


def read_encoder(
    wrapper: Wrapper, config: Mapping[str, Any], spec: ModelSpec
) -> tuple[tuple[TensorSpec, ...], str]:
    """The encoder's tensors, or none and why they are not known: a text-only plan does not need
    them, so what is missing is not an error yet."""
    settings = config.get("vision_config")
    if not isinstance(settings, dict):
        return (), "its config has no vision_config, so the vision encoder's size is not known."
    if config.get("audio_config"):
        return (), "there is no arithmetic for its audio encoder."
    outer = Config(config, {}, {})
    try:
        reader = Config(settings, wrapper.vision_defaults, {})
        return tuple(wrapper.encoder(spec, reader, outer)), ""
    except (ModelError, UnknownArchitecture) as error:
        return (), f"of its vision encoder: {error}"


def _by_kind(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """The towers that LLaVA's wrappers can hold, under their names, and the projector.

    Raises:
        UnknownArchitecture: a tower that has no arithmetic here.
    """
    kind = config.get("model_type")
    tower = vision.TOWERS.get(kind if isinstance(kind, str) else "")
    if tower is None:
        raise UnknownArchitecture(f"there is no arithmetic for the tower {str(kind)[:40]!r}.")
    yield from tower(config)
    yield from vision.llava_projector(spec, config, outer)


def _llava_next(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    yield TensorSpec("image_newline", (spec.hidden_size,), "other")
    yield from _by_kind(spec, config, outer)


_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_SIGLIP = {**_CLIP, "image_size": 224, "patch_size": 16, "num_channels": 3}
_QWEN = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}
_QWEN3_VL = Wrapper("Qwen3VLForConditionalGeneration", "qwen3_vl_text", vision.qwen3, _QWEN)
_KIMI = Wrapper(
    "KimiK25ForConditionalGeneration",
    "deepseek_v3",
    vision.kimi,
    {"patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64},
)

WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration", "gemma3_text", vision.gemma3, _SIGLIP, runs=True
    ),
    "gemma4": Wrapper(
        "Gemma4ForConditionalGeneration",
        "gemma4_text",
        vision.gemma4,
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "head_dim": 64,
            "patch_size": 16,
            "position_embedding_size": 10_240,
        },
    ),
    "mistral3": Wrapper(
        "Mistral3ForConditionalGeneration",
        "mistral",
        vision.mistral3,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_channels": 3,
            "patch_size": 16,
        },
    ),
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": replace(
        _QWEN3_VL,
        native_class="Qwen3VLMoeForConditionalGeneration",
        text_family="qwen3_vl_moe_text",
    ),
    "qwen3_5": replace(
        _QWEN3_VL,
        native_class="Qwen3_5ForConditionalGeneration",
        text_family="qwen3_5_text",
        encoder=vision.qwen3_5,
    ),
    "qwen3_5_moe": replace(
        _QWEN3_VL,
        native_class="Qwen3_5MoeForConditionalGeneration",
        text_family="qwen3_5_moe_text",
        encoder=vision.qwen3_5,
    ),
    "qwen2_5_vl": Wrapper(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl_text",
        vision.qwen2_5,
        {
            "depth": 32,
            "hidden_size": 3584,
            "intermediate_size": 3420,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
        },
        flat=True,
    ),
    "llama4": Wrapper(
        "Llama4ForConditionalGeneration",
        "llama4_text",
        vision.llama4,
        {
            "hidden_size": 768,
            "num_hidden_layers": 34,
            "intermediate_size": 5632,
            "num_channels": 3,
            "image_size": 448,
            "patch_size": 14,
            "vision_output_dim": 7680,
            "projector_input_dim": 4096,
            "projector_output_dim": 4096,
            "pixel_shuffle_ratio": 0.5,
        },
    ),
    "llava": Wrapper("LlavaForConditionalGeneration", "llama", _by_kind, _SIGLIP),
    "llava_next": Wrapper("LlavaNextForConditionalGeneration", "llama", _llava_next, _SIGLIP),
    "minimax_m3_vl": Wrapper(
        "MiniMaxM3SparseForConditionalGeneration",
        "minimax_m3_vl_text",
        vision.minimax,
        {"num_channels": 3, "patch_size": 14},
    ),
    "kimi_k25": _KIMI,
    # MoonViT under its first names; not a class of transformers
    "kimi_vl": replace(_KIMI, native_class="KimiVLForConditionalGeneration"),
}

FAMILIES: Mapping[str, Family] = {
    "qwen3_vl_text": Family(
        "Qwen3VLForConditionalGeneration",
        dense.qwen3,
        full,
        rope=rope.multimodal,
        defaults={"head_dim": 128},
    ),
    "qwen2_5_vl_text": Family(
        "Qwen2_5_VLForConditionalGeneration",
        dense.qwen2,
        dense.last_slide,
        rope=rope.multimodal,
        defaults={
            "num_key_value_heads": 8,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 80,
        },
    ),
}
