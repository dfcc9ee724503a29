"""Quantized checkpoints: from config.json's `quantization_config` to how each weight is stored.

Formats are those that transformers and vLLM load: fp8 (DeepSeek's blocks or a scale a tensor),
compressed-tensors, AWQ, GPTQ and AutoRound, ModelOpt, mxfp4 and bitsandbytes. A method that is not
here is an error, never a guess.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ullage.errors import ModelError
from ullage.specs.model import ModelSpec, Storage, TensorSpec

_QUANTIZABLE = ("linear", "expert")


@dataclass(frozen=True)
class Quantized:
    """The storage of quantized weights, and which weights keep the model's dtype."""

    storage: Storage
    ignored: tuple[str, ...] = ()
    experts_only: bool = False

    def keeps(self, name: str, role: str) -> bool:
        """Whether the weight of that name stays as it is."""
        # stacked experts are called by their module alone
        if role not in _QUANTIZABLE or not (name.endswith(".weight") or role == "expert"):
            return True
        if self.experts_only and role != "expert":
            return True
        module = name.removesuffix(".weight")
        return any(_matches(pattern, module) for pattern in self.ignored)


def read_quantization(config: Mapping[str, Any]) -> Quantized | None:
    """What a config.json says of quantized weights, None where it says nothing.

    Raises:
        ModelError: a method or a setting that has no arithmetic here.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise ModelError("The model's config says quantization_config = something else than that.")
    method = str(settings.get("quant_method", "")).lower()
    reader = _METHODS.get(method)
    if reader is None:
        raise ModelError(
            f"There is no arithmetic for the quantization {method[:40]!r}. "
            f"Known: {', '.join(_METHODS)}."
        )
    return reader(settings)


def apply(quantized: Quantized, tensors: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    """The tensors with their storage; one that some layers leave alone is split in two."""
    for tensor in tensors:
        if not tensor.layers:
            kept = quantized.keeps(tensor.name, tensor.role)
            yield tensor if kept else replace(tensor, storage=quantized.storage)
            continue
        kept_layers = tuple(
            layer
            for layer in tensor.layers
            if quantized.keeps(tensor.name.replace("{}", str(layer), 1), tensor.role)
        )
        if kept_layers:
            yield replace(tensor, layers=kept_layers)
        if len(kept_layers) < len(tensor.layers):
            rest = tuple(layer for layer in tensor.layers if layer not in kept_layers)
            yield replace(tensor, layers=rest, storage=quantized.storage)


def _matches(pattern: str, module: str) -> bool:
    """As compressed-tensors and transformers match: ``re:`` is a regular expression, ``*`` stands
    for anything, a bare name for itself, the modules inside it and its last part."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:
        return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), module) is not None
    text = re.sub(r"^(language_model\.)?model\.language_model\.", "model.", pattern)
    return module == text or module.startswith(f"{text}.") or module.endswith(f".{text}")


def _names(settings: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The patterns under whichever of `keys` is there."""
    found: Any = next((settings[key] for key in keys if settings.get(key)), [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ModelError(f"The model's quantization_config has a garbled {keys[0]!r}.")
    return tuple(found)


def _bits(settings: Mapping[str, Any], key: str = "bits") -> int:
    bits = settings.get(key)
    if bits not in (2, 3, 4, 5, 6, 8):
        raise ModelError(f"The model's quantization_config says {key} = {repr(bits)[:40]}.")
    return int(bits)


def _group(settings: Mapping[str, Any], default: int | None = None) -> int:
    """Columns that share a scale; 0 where a whole row does."""
    size = settings.get("group_size", default)
    if size is None or size == -1:
        return 0
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= 1 << 20:
        raise ModelError(f"The model's quantization_config says group_size = {repr(size)[:40]}.")
    return size


def _fp8(settings: Mapping[str, Any]) -> Quantized:
    """DeepSeek's layout: an fp32 scale for each block; without blocks, one for the tensor."""
    ignored = _names(settings, "modules_to_not_convert", "ignored_layers")
    block = settings.get("weight_block_size")
    if block is None:
        return Quantized(Storage("fp8", 8, 0, 0, 4.0), ignored)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(size, int) and size > 0 for size in block)
    ):
        raise ModelError("The model's quantization_config has a garbled 'weight_block_size'.")
    return Quantized(Storage("fp8", 8, block[0], block[1], 4.0), ignored)


def _awq(settings: Mapping[str, Any]) -> Quantized:
    """Packed integers, and for each group a 16-bit scale and a zero of the same bits."""
    bits, group = _bits(settings), _group(settings, 128)
    storage = Storage(f"int{bits}", bits, 1, group, 2 + bits / 8)
    return Quantized(storage, _names(settings, "modules_to_not_convert"))


def _bitsandbytes(settings: Mapping[str, Any]) -> Quantized:
    """NF4 or FP4: a scale for 64 numbers, perhaps itself in 8 bits; int8: a scale a row."""
    ignored = _names(settings, "llm_int8_skip_modules")
    if settings.get("load_in_8bit"):
        return Quantized(Storage("int8", 8, 1, 0, 4.0), ignored)
    nested = bool(settings.get("bnb_4bit_use_double_quant"))
    name = str(settings.get("bnb_4bit_quant_type", "fp4"))
    return Quantized(Storage(name, 4, 1, 64, 1 + 4 / 256 if nested else 4.0), ignored)


def _mxfp4(settings: Mapping[str, Any]) -> Quantized:
    """gpt-oss: experts in 4-bit floats, an 8-bit exponent for 32 of them."""
    ignored = _names(settings, "modules_to_not_convert")
    return Quantized(Storage("mxfp4", 4, 1, 32, 1.0), ignored, experts_only=True)


_NVFP4 = Storage("nvfp4", 4, 1, 16, 1.0)


def _modelopt(settings: Mapping[str, Any]) -> Quantized:
    """NVIDIA's ModelOpt: NVFP4 with an fp8 scale for 16 numbers, or FP8 with one for the tensor."""
    ignored = _names(settings, "ignore", "exclude_modules")
    algorithm = str(settings.get("quant_algo") or settings.get("quant_type") or "").upper()
    if "NVFP4" in algorithm or "FP4" in algorithm:
        return Quantized(_NVFP4, ignored)
    if "FP8" in algorithm:
        return Quantized(Storage("fp8", 8, 0, 0, 4.0), ignored)
    raise ModelError(f"There is no arithmetic for ModelOpt's {algorithm[:40]!r}.")


def _compressed(settings: Mapping[str, Any]) -> Quantized:
    """compressed-tensors: one group of settings for all linear layers."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError("The model's quantization_config has no 'config_groups'.")
    storages = {_group_storage(group) for group in groups.values()}
    if len(storages) != 1:
        raise ModelError("There is no arithmetic for a mix of quantizations in one checkpoint.")
    return Quantized(storages.pop(), _names(settings, "ignore"))


def _group_storage(group: Any) -> Storage:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ModelError("The model's quantization_config has a group without 'weights'.")
    bits, kind = _bits(weights, "num_bits"), weights.get("type")
    strategy = weights.get("strategy")
    if kind == "float" and bits == 4:
        return _NVFP4 if _group(weights, 16) == 16 else Storage("mxfp4", 4, 1, 32, 1.0)
    zero_bytes = 0.0 if weights.get("symmetric", True) else bits / 8
    name = f"fp{bits}" if kind == "float" else f"int{bits}"
    if strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
        return Storage(name, bits, rows, columns, 4.0)
    if strategy == "tensor":
        return Storage(name, bits, 0, 0, 4.0)
    # a 16-bit scale for a group of columns, or for the row
    return Storage(name, bits, 1, _group(weights) if strategy == "group" else 0, 2 + zero_bytes)


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Quantized]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda settings: Quantized(
        Storage("fp8", 8, 1, 0, 4.0), _names(settings, "modules_to_not_convert")
    ),
    "awq": _awq,
    "gptq": _awq,  # the same bytes but for an index of the columns
    "auto-round": _awq,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}


# What a checkpoint of a format holds for each weight of a linear layer, by the name people use.
CHECKPOINT_FORMATS: Mapping[str, Storage] = {
    "fp8": Storage("fp8", 8, 1, 0, 2.0),  # w8a8 fp8 with a scale a row
    "int8": Storage("int8", 8, 1, 0, 2.0),  # w8a8 with a scale a row
    "int4": Storage("int4", 4, 1, 128, 2.0),  # w4a16, symmetric, groups of 128
    "nvfp4": _NVFP4,
    "mxfp4": Storage("mxfp4", 4, 1, 32, 1.0),
    "nf4": Storage("nf4", 4, 1, 64, 4.0),
}


def as_checkpoint(model: ModelSpec, name: str) -> ModelSpec:
    """`model` as a checkpoint in the format called `name` holds it; embeddings and head stay.

    Raises:
        ModelError: the checkpoint is quantized already.
    """
    if model.prequantized:
        raise ModelError(f"{model.name} is quantized already: leave --weights out.")
    tensors = apply(Quantized(CHECKPOINT_FORMATS[name]), model.tensors)
    return replace(model, tensors=tuple(tensors))
