"""Quantized checkpoints: from config.json's `quantization_config` to how each weight is stored.

Formats are those that transformers and vLLM load: fp8 (DeepSeek's blocks or a scale a tensor),
compressed-tensors, AWQ, GPTQ and AutoRound, ModelOpt, mxfp4 and bitsandbytes. A method that is not
here is an error, never a guess.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ullage.errors import ModelError
from ullage.specs.model import ModelSpec, Role, Storage, TensorSpec
from ullage.specs.patterns import Patterns

_NVFP4 = Storage("nvfp4", 4, 1, 16, 1.0)
_MXFP4 = Storage("mxfp4", 4, 1, 32, 1.0)


@dataclass(frozen=True)
class Rule:
    """The storage of the modules that `targets` stand for, None for all linear ones, or for those
    of experts only."""

    storage: Storage
    targets: Patterns | None = None
    experts_only: bool = False

    def holds(self, module: str, role: Role) -> bool:
        """Whether a module is stored so; an output head only where it is named."""
        if self.targets is None:
            return role == "expert" or (role == "linear" and not self.experts_only)
        return role in ("linear", "expert", "head") and self.targets.matches(module)


@dataclass(frozen=True)
class Quantized:
    """How a checkpoint's weights are quantized: the first of `rules` that stands for a module, but
    for the `ignored` ones, which keep the model's dtype."""

    rules: tuple[Rule, ...]
    ignored: Patterns = field(default_factory=lambda: Patterns(()))

    def storage(self, name: str, role: Role, shape: tuple[int, ...]) -> Storage | None:
        """The storage of the weight of that name, None where it stays as it is."""
        if len(shape) != 2:
            return None
        module = name.removesuffix(".weight").replace("{}", "0")
        for rule in self.rules:
            if rule.holds(module, role):
                return None if self.ignored.matches(module) else rule.storage
        return None


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
    if not method and settings.get("quant_algo"):
        method = "modelopt"  # whose first files do not say so
    reader = _METHODS.get(method)
    if reader is None:
        raise ModelError(
            f"There is no arithmetic for the quantization {method[:40]!r}. "
            f"Known: {', '.join(_METHODS)}."
        )
    quantized = reader(settings)
    if config.get("expert_dtype") != "fp4":
        return quantized
    # DeepSeek V4's experts, whatever the rest is in
    return replace(quantized, rules=(Rule(_MXFP4, experts_only=True), *quantized.rules))


def apply(quantized: Quantized, tensors: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    """The tensors with their storage; one whose layers differ in it is split."""
    for tensor in tensors:
        if not tensor.layers:
            storage = quantized.storage(tensor.name, tensor.role, tensor.shape)
            yield tensor if storage is None else replace(tensor, storage=storage)
            continue
        by_storage: dict[Storage | None, list[int]] = {}
        for layer in tensor.layers:
            name = tensor.name.replace("{}", str(layer), 1)
            storage = quantized.storage(name, tensor.role, tensor.shape)
            by_storage.setdefault(storage, []).append(layer)
        for storage, layers in by_storage.items():
            yield replace(tensor, layers=tuple(layers), storage=storage)


def _one(storage: Storage, ignored: Patterns) -> Quantized:
    return Quantized((Rule(storage),), ignored)


def _names(settings: Mapping[str, Any], *keys: str) -> Patterns:
    """The patterns under whichever of `keys` is there."""
    found: Any = next((settings[key] for key in keys if settings.get(key)), [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ModelError(f"The model's quantization_config has a garbled {keys[0]!r}.")
    return Patterns(found)


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
        return _one(Storage("fp8", 8, 0, 0, 4.0), ignored)
    rows, columns = _block(block)
    return _one(Storage("fp8", 8, rows, columns, 4.0), ignored)


def _block(block: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and 0 < size <= 1 << 20 for size in block)
    ):
        raise ModelError("The model's quantization_config has a garbled block of weights.")
    return block[0], block[1]


def _awq(settings: Mapping[str, Any]) -> Quantized:
    """Packed integers, and for each group a 16-bit scale and a zero of the same bits."""
    bits, group = _bits(settings), _group(settings, 128)
    storage = Storage(f"int{bits}", bits, 1, group, 2 + bits / 8)
    return _one(storage, _names(settings, "modules_to_not_convert"))


def _gptq(settings: Mapping[str, Any]) -> Quantized:
    """AWQ's bytes; with columns in the order of their activations (`desc_act`) also the group of
    each column in 32 bits, which engines drop without it."""
    ordered, plain = settings.get("desc_act") is True, _awq(settings)
    (rule,) = plain.rules
    return _one(replace(rule.storage, column_bytes=4.0 * ordered), plain.ignored)


def _bitsandbytes(settings: Mapping[str, Any]) -> Quantized:
    """NF4 or FP4: a scale for 64 numbers, perhaps itself in 8 bits; int8: a scale a row."""
    ignored = _names(settings, "llm_int8_skip_modules")
    if settings.get("load_in_8bit"):
        return _one(Storage("int8", 8, 1, 0, 4.0), ignored)
    nested = bool(settings.get("bnb_4bit_use_double_quant"))
    name = str(settings.get("bnb_4bit_quant_type", "fp4"))
    return _one(Storage(name, 4, 1, 64, 1 + 4 / 256 if nested else 4.0), ignored)


def _mxfp4(settings: Mapping[str, Any]) -> Quantized:
    """gpt-oss: experts in 4-bit floats, an 8-bit exponent for 32 of them."""
    ignored = _names(settings, "modules_to_not_convert")
    return Quantized((Rule(_MXFP4, experts_only=True),), ignored)


def _modelopt(settings: Mapping[str, Any]) -> Quantized:
    """NVIDIA's ModelOpt: NVFP4 with an fp8 scale for 16 numbers, FP8 with one for the tensor, or
    one of these for each module by its name."""
    ignored = _names(settings, "ignore", "exclude_modules")
    algorithm = str(settings.get("quant_algo") or settings.get("quant_type") or "").upper()
    if algorithm != "MIXED_PRECISION":
        return _one(_modelopt_storage(algorithm), ignored)
    named = settings.get("quantized_layers")
    if not isinstance(named, Mapping) or not named:
        raise ModelError("The model's quantization_config has no 'quantized_layers'.")
    targets: dict[Storage, list[str]] = {}
    for module, how in named.items():
        stated = how.get("quant_algo") if isinstance(how, Mapping) else None
        targets.setdefault(_modelopt_storage(str(stated).upper()), []).append(str(module))
    rules = tuple(Rule(storage, Patterns(names)) for storage, names in targets.items())
    return Quantized(rules, ignored)


def _modelopt_storage(algorithm: str) -> Storage:
    if "FP4" in algorithm:
        return _NVFP4
    if "FP8" in algorithm:
        return Storage("fp8", 8, 0, 0, 4.0)
    raise ModelError(f"There is no arithmetic for ModelOpt's {algorithm[:40]!r}.")


def _compressed(settings: Mapping[str, Any]) -> Quantized:
    """compressed-tensors: groups of settings, for modules by name and for all linear layers."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError("The model's quantization_config has no 'config_groups'.")
    named, classes = [], []
    for group in groups.values():
        storage = _group_storage(group)
        targets = group.get("targets") or ["Linear"]
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise ModelError("The model's quantization_config has garbled 'targets'.")
        if "Linear" in targets:
            classes.append(Rule(storage))
        if rest := [name for name in targets if name != "Linear"]:
            named.append(Rule(storage, Patterns(rest)))
    if len({rule.storage for rule in classes}) > 1:
        raise ModelError("The model's quantization_config has two formats for all linear layers.")
    return Quantized((*named, *classes), _names(settings, "ignore"))


def _group_storage(group: Any) -> Storage:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ModelError("The model's quantization_config has a group without 'weights'.")
    bits, kind = _bits(weights, "num_bits"), weights.get("type")
    strategy = weights.get("strategy")
    if kind == "float" and bits == 4:
        return _NVFP4 if _group(weights, 16) == 16 else _MXFP4
    zero_bytes = 0.0 if weights.get("symmetric", True) else bits / 8
    name = f"fp{bits}" if kind == "float" else f"int{bits}"
    if strategy == "block":
        rows, columns = _block(weights.get("block_structure") or [128, 128])
        return Storage(name, bits, rows, columns, 4.0)
    if strategy == "tensor":
        return Storage(name, bits, 0, 0, 4.0)
    # a 16-bit scale for a group of columns, or for the row
    return Storage(name, bits, 1, _group(weights) if strategy == "group" else 0, 2 + zero_bytes)


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Quantized]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda settings: _one(
        Storage("fp8", 8, 1, 0, 4.0), _names(settings, "modules_to_not_convert")
    ),
    "awq": _awq,
    "gptq": _gptq,
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
    tensors = apply(Quantized((Rule(CHECKPOINT_FORMATS[name]),)), model.tensors)
    return replace(model, tensors=tuple(tensors), converted=name)
