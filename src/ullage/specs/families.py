"""The dense decoder-only families: from a config.json to the geometry and every tensor.

One small function a family says which tensors its causal-LM class in transformers 5 has; the table
at the end holds the defaults of its config class for keys that published configs leave out. A key
that is neither in the config nor in the table is an error: nothing is guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ullage.errors import CheckpointError, ModelError, UnknownArchitecture
from ullage.specs import tensors
from ullage.specs.config import Config, refuse_foreign
from ullage.specs.dtypes import dtype_name
from ullage.specs.model import LayerCache, ModelSpec
from ullage.specs.quantized import apply, read_quantization
from ullage.specs.tensors import Tensors

# `caches` has an entry a layer, so a config that lies about its depth must not fill the memory.
_MOST_LAYERS = 4096
Windows = tuple[int | None, ...]


@dataclass(frozen=True)
class Family:
    """A model_type: its causal-LM class, tensors and windows, and its config class's defaults."""

    native_class: str
    tensors: Callable[[ModelSpec, Config], Tensors]
    windows: Callable[[Config, int], Windows]
    gated_mlp: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)


def spec_from_config(config: Mapping[str, Any], name: str = "", source: str = "") -> ModelSpec:
    """The spec of the model that a config.json (as a dict) describes.

    Of a Gemma 3 with vision only the text model counts. A config that states no dtype is fp32.

    Raises:
        UnknownArchitecture: a family, or a class of a family, that has no arithmetic here.
        CheckpointError: the model runs code from its own repository.
        ModelError: a needed key is absent, or a value cannot be true.
    """
    config, family_name, native_classes = _text_model(config)
    family = _known_family(config, family_name)
    refuse_foreign(config, family_name, (family.native_class, *native_classes))
    reader = Config(config, family.defaults, family.spelling)
    for oddity in ("use_bidirectional_attention", "add_cross_attention", "per_layer_config"):
        if reader.get(oddity):
            raise UnknownArchitecture(f"There is no arithmetic for models with {oddity}.")
    spec = replace(_geometry(reader, family), name=name, family=family_name, source=source)
    tensors = family.tensors(spec, reader)
    quantized = read_quantization(config)
    return replace(spec, tensors=tuple(tensors if quantized is None else apply(quantized, tensors)))


def _text_model(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """The config of the text part, its family, and the wrapper's own class if it has one."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            "The model's config has no 'model_type': is it a transformers config.json?"
        )
    if model_type != "gemma3":
        return config, model_type, ()
    text_config = config.get("text_config")
    if not isinstance(text_config, dict):
        raise ModelError("The model's config has no 'text_config', which a gemma3 needs.")
    outer = {
        key: value for key, value in config.items() if key not in ("text_config", "model_type")
    }
    text_config = {key: value for key, value in text_config.items() if key != "architectures"}
    return {**outer, **text_config}, "gemma3_text", ("Gemma3ForConditionalGeneration",)


def _known_family(config: Mapping[str, Any], family_name: str) -> Family:
    if family_name in FAMILIES:
        return FAMILIES[family_name]
    if config.get("auto_map"):
        raise CheckpointError(
            f"The model (family {family_name[:60]!r}) needs "
            "code from its own repository (trust_remote_code), which ullage never executes."
        )
    raise UnknownArchitecture(
        f"There is no arithmetic for the family {family_name[:60]!r}, and ullage does not guess. "
        f"Known: {', '.join(FAMILIES)}."
    )


def _geometry(config: Config, family: Family) -> ModelSpec:
    num_layers = config.size("num_hidden_layers", _MOST_LAYERS)
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.optional_size("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(
            f"The model's config has {heads} heads for {kv_heads} KV heads: no multiple."
        )
    head_dim = config.optional_size("head_dim") or _split_evenly(hidden, heads)
    width = 2 * kv_heads * head_dim
    return ModelSpec(
        name="",
        family="",
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_intermediate_size(config, hidden),
        vocab_size=config.size("vocab_size"),
        max_context_tokens=config.size("max_position_embeddings"),
        tie_embeddings=config.flag("tie_word_embeddings"),
        gated_mlp=family.gated_mlp,
        dtype=_dtype(config),
        caches=tuple(LayerCache(width, window) for window in family.windows(config, num_layers)),
        tensors=(),
        softcap=config.optional_number("attn_logit_softcapping"),
    )


def _split_evenly(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ModelError(f"The model's config has a hidden size of {hidden} for {heads} heads.")
    return hidden // heads


def _intermediate_size(config: Config, hidden: int) -> int:
    if config.spell("intermediate_size") == "n_inner":  # GPT-2: null means four times the width
        return config.optional_size("intermediate_size") or 4 * hidden
    return config.size("intermediate_size")


def _dtype(config: Config) -> str:
    text = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = dtype_name(text) if isinstance(text, str) else None
    if dtype is None:
        raise ModelError(
            f"The model's config says dtype = {repr(text)[:60]}; known: fp32, bf16 and fp16."
        )
    return dtype


def _full(config: Config, num_layers: int) -> Windows:
    return _no_layer_types(config, (None,) * num_layers)


def _all_slide(config: Config, num_layers: int) -> Windows:
    return _no_layer_types(config, (config.optional_size("sliding_window"),) * num_layers)


def _no_layer_types(config: Config, windows: Windows) -> Windows:
    if config.get("layer_types") is not None:
        raise ModelError("The model's config has 'layer_types', which its family does not use.")
    return windows


def _last_slide(config: Config, num_layers: int) -> Windows:
    """Qwen: layers from `max_window_layers` on slide, if sliding is switched on."""
    first = config.get("max_window_layers")
    if not isinstance(first, int) or first < 0:
        raise ModelError(f"The model's config says max_window_layers = {first!r}.")
    window = config.optional_size("sliding_window") if config.flag("use_sliding_window") else None
    return _by_type(config, [layer >= first for layer in range(num_layers)], window)


def _most_slide(config: Config, num_layers: int) -> Windows:
    """Gemma 3: every `sliding_window_pattern`-th layer sees everything, the others slide."""
    return _periodic(config, num_layers, config.size("sliding_window_pattern"))


def _alternate(config: Config, num_layers: int) -> Windows:
    """Gemma 2: every second layer sees everything."""
    return _periodic(config, num_layers, 2)


def _periodic(config: Config, num_layers: int, period: int) -> Windows:
    window = config.optional_size("sliding_window")
    return _by_type(config, [bool((layer + 1) % period) for layer in range(num_layers)], window)


def _by_type(config: Config, slides: list[bool], window: int | None) -> Windows:
    """An explicit `layer_types` goes before the family's rule."""
    types = config.get("layer_types")
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(types, list) or not all(str(kind) in known for kind in types):
            raise ModelError(
                f"The model's config has layer_types other than {' and '.join(known)}."
            )
        if len(types) != len(slides):
            raise ModelError(
                f"The model's config has {len(types)} layer_types, {len(slides)} layers."
            )
        slides = [known[kind] for kind in types]
    return tuple(window if slide else None for slide in slides)


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", tensors.llama, _full),
    "mistral": Family(
        "MistralForCausalLM",
        tensors.mistral,
        _all_slide,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        tensors.qwen2,
        _last_slide,
        defaults={"num_key_value_heads": 32, **_QWEN_WINDOWS},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        tensors.qwen3,
        _last_slide,
        defaults={"num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOWS},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        tensors.gemma,
        _full,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        tensors.gemma2,
        _alternate,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
        },
    ),
    # Published Gemma 3 configs leave out whatever is the config class's default, even the heads.
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        tensors.gemma3,
        _most_slide,
        defaults={
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
    ),
    "phi": Family("PhiForCausalLM", tensors.phi, _full, gated_mlp=False),
    "phi3": Family("Phi3ForCausalLM", tensors.phi3, _all_slide),
    "gpt2": Family(
        "GPT2LMHeadModel",
        tensors.gpt2,
        _full,
        gated_mlp=False,
        defaults={"tie_word_embeddings": True},
        spelling={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
    ),
}
