"""The families of decoder-only models: from a config.json to the geometry, the cache of every layer
and every tensor.

One small function a family says which tensors its causal-LM class in transformers 5 has; the tables
at the ends of the modules hold the defaults of its config class for keys that published configs
leave out. A key that is neither in the config nor in the table is an error: nothing is guessed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ullage.errors import CheckpointError, ModelError, UnknownArchitecture
from ullage.specs.config import Config, refuse_foreign
from ullage.specs.dtypes import dtype_name
from ullage.specs.families import (
    classic,
    dense,
    experts,
    gemma,
    hybrid,
    latent,
    mamba,
    sparse,
    wrappers,
)
from ullage.specs.families.base import Family
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.quantized import apply, read_quantization

FAMILIES: Mapping[str, Family] = {
    **dense.FAMILIES,
    **classic.FAMILIES,
    **gemma.FAMILIES,
    **experts.FAMILIES,
    **latent.FAMILIES,
    **hybrid.FAMILIES,
    **mamba.FAMILIES,
    **sparse.FAMILIES,
    **wrappers.FAMILIES,
}
RUNNING: tuple[str, ...] = tuple(name for name, family in FAMILIES.items() if family.runs)
_ODDITIES = ("add_cross_attention", "per_layer_config", "block_configs")


def spec_from_config(config: Mapping[str, Any], name: str = "", source: str = "") -> ModelSpec:
    """The spec of the model that a config.json (as a dict) describes.

    Of a model with vision the text model counts, and its encoder is listed apart. A config that
    states no dtype is fp32, or bf16 where its weights are quantized.

    Raises:
        UnknownArchitecture: a family, or a class of a family, that has no arithmetic here.
        CheckpointError: the model runs code from its own repository.
        ModelError: a needed key is absent, or a value cannot be true.
    """
    family_name, text, wrapper = wrappers.text_model(config)
    family = _known_family(config, family_name)
    native = (family.native_class, *((wrapper.native_class,) if wrapper else ()))
    refuse_foreign(text, family_name, native)
    reader = Config(text, family.defaults, family.spelling)
    _refuse_oddities(reader, family)
    spec = replace(_geometry(reader, family), name=name, family=family_name, source=source)
    spec = replace(spec, caches=family.caches(spec, reader), rope_tables=family.rope(spec, reader))
    tensors = _present(family.tensors(spec, reader))
    quantized = read_quantization(text)
    spec = replace(spec, tensors=tuple(tensors if quantized is None else apply(quantized, tensors)))
    if wrapper is None:
        return spec
    encoder, gap = wrappers.read_encoder(wrapper, config, spec)
    runs = spec.runs and wrapper.runs
    return replace(spec, encoder=encoder, encoder_gap=gap, runs=runs)


def _present(tensors: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    """Without weights of a kind of layer that this model has none of."""
    return (tensor for tensor in tensors if tensor.layers or "{}" not in tensor.name)


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
        f"Known: {', '.join((*FAMILIES, *wrappers.WRAPPERS))}."
    )


def _refuse_oddities(config: Config, family: Family) -> None:
    """Keys that would change the arithmetic."""
    for oddity in (*_ODDITIES, *family.oddities):
        if config.get(oddity):
            raise UnknownArchitecture(f"There is no arithmetic for models with {oddity}.")
    # Gemma 4 sees the tokens of one picture both ways, which changes no byte
    if config.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise UnknownArchitecture(
            "There is no arithmetic for models with use_bidirectional_attention."
        )


def _geometry(config: Config, family: Family) -> ModelSpec:
    hidden, heads = config.size("hidden_size"), family.heads(config)
    return ModelSpec(
        name="",
        family="",
        num_layers=family.depth(config),
        hidden_size=hidden,
        num_heads=heads.queries,
        num_kv_heads=heads.keys,
        head_dim=heads.dim,
        intermediate_size=family.inner(config),
        vocab_size=config.size("vocab_size"),
        max_context_tokens=config.size("max_position_embeddings"),
        tie_embeddings=config.flag("tie_word_embeddings"),
        gated_mlp=family.gated_mlp,
        dtype=_dtype(config),
        caches=(),
        tensors=(),
        softcap=config.optional_number("attn_logit_softcapping"),
        runs=family.runs,
    )


def _dtype(config: Config) -> str:
    default = "bfloat16" if config.get("quantization_config") else "float32"
    text = config.get("dtype") or config.get("torch_dtype") or default
    dtype = dtype_name(text) if isinstance(text, str) else None
    if dtype is None:
        raise ModelError(
            f"The model's config says dtype = {repr(text)[:60]}; known: fp32, bf16 and fp16."
        )
    return dtype
