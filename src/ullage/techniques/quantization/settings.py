"""Settings of weight quantization and its bytes. No torch.

int8: one byte a weight and one scale a row (torchao's int8 weight-only).
nf4: QLoRA section 3: 4-bit NormalFloat in blocks of 64, the scales themselves quantized to 8 bits
in blocks of 256 ("double quantization").
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from ullage.errors import TechniqueError
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Footprint
from ullage.specs.loading import load_spike_bytes
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.workload import Step
from ullage.techniques.base import Technique
from ullage.units import MIB

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

Scheme = Literal["none", "int8", "nf4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

NF4_BLOCK = 64  # weights that share a scale
NF4_SCALE_BLOCK = 256  # scales that share a scale
NF4_TABLE_BYTES = 16 * 4 + 256 * 4 + 4  # both code books in fp32 and the mean of the scales

# What the library and its many small tables add to the process, measured with bitsandbytes 0.50.2
# on x86-64.
LIBRARY_BYTES = {"none": 0, "int8": 0, "nf4": 50 * MIB}


@dataclass(frozen=True)
class Quantization(Technique):
    """Projections inside the layers in `scheme`; embeddings, norms and the output head stay."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.14314"
    acts_on: ClassVar[Literal["weights"]] = "weights"

    scheme: Scheme = "int8"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise TechniqueError(f"quantization: scheme is one of {known}, not {self.scheme!r}.")

    @classmethod
    def neutral(cls) -> Self:
        return cls(scheme="none")

    def unsupported(self, model: ModelSpec) -> str | None:
        if self.scheme != "none" and model.prequantized:
            return "its weights are quantized already."
        if self.scheme != "none" and not any(t.role == "linear" for t in model.tensors):
            return f"{model.family} models have no linear layers that a quantizer converts."
        return None

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        if self.scheme == "none":
            return before
        return replace(
            before,
            weights_bytes=before.weights_bytes - _saved_bytes(self, model, work.execution.dtype),
            activation_bytes=before.activation_bytes + self._scratch_bytes(before, model, work),
            overhead_bytes=before.overhead_bytes + LIBRARY_BYTES[self.scheme],
        )

    def resident_bytes(self, tensor: TensorSpec, dtype: str) -> int:
        """Bytes that `tensor` keeps once loaded; unquantized tensors and scales are in `dtype`."""
        if tensor.role != "linear" or self.scheme == "none":
            return _plain_bytes(tensor, dtype)
        if self.scheme == "int8":
            rows = tensor.shape[0]
            return tensor.elements + rows * DTYPE_BYTES[dtype]
        scales = -(-tensor.elements // NF4_BLOCK)
        outer_scales = -(-scales // NF4_SCALE_BLOCK)
        return -(-tensor.elements // 2) + scales + 4 * outer_scales + NF4_TABLE_BYTES

    def moved_bytes(self, model: ModelSpec, work: Step, device: Device) -> int:
        """Weights are widened to the arithmetic's format at each use, written and read again; but
        bitsandbytes multiplies NF4 by a single token as it lies, on GPUs."""
        fused = self.scheme == "nf4" and device.kind in ("cuda", "rocm") and work.new_tokens == 1
        if self.scheme == "none" or fused:
            return 0
        return 2 * _dequantized_bytes(model, work.execution.dtype)

    def _scratch_bytes(self, before: Footprint, model: ModelSpec, work: Step) -> int:
        """Dequantized copies: one weight at a time while running, one on its way in while
        loading."""
        dtype = work.execution.dtype
        if work.phase != "load":
            return _largest_bytes(model, dtype)
        return max(0, _spike_bytes(self, model, dtype) - before.activation_bytes)

    @contextmanager
    def attach(self, model: "PreTrainedModel") -> Iterator[None]:
        from ullage.techniques.quantization.linear import quantized

        with quantized(model, self.scheme):
            yield

    def while_loading(self, model: "PreTrainedModel") -> "Mapping[str, Callable[[Module], Module]]":
        from ullage.techniques.quantization.linear import projections, quantizer

        if self.scheme == "none":
            return {}
        return dict.fromkeys((name for name, _ in projections(model)), quantizer(self.scheme))


# A search asks for these sums thousands of times.


@lru_cache
def _saved_bytes(technique: Quantization, model: ModelSpec, dtype: str) -> int:
    return sum(
        tensor.count * (_plain_bytes(tensor, dtype) - technique.resident_bytes(tensor, dtype))
        for tensor in model.tensors
    )


@lru_cache
def _spike_bytes(technique: Quantization, model: ModelSpec, dtype: str) -> int:
    def staging(tensor: TensorSpec) -> int:
        # the full weight, and the quantizer's own copy of it in fp32
        return 2 * 4 * tensor.elements if tensor.role == "linear" else 0

    return load_spike_bytes(model, lambda tensor: technique.resident_bytes(tensor, dtype), staging)


@lru_cache
def _dequantized_bytes(model: ModelSpec, dtype: str) -> int:
    linear = (tensor for tensor in model.tensors if tensor.role == "linear")
    return sum(tensor.count * _plain_bytes(tensor, dtype) for tensor in linear)


@lru_cache
def _largest_bytes(model: ModelSpec, dtype: str) -> int:
    linear = (tensor for tensor in model.tensors if tensor.role == "linear")
    return max(_plain_bytes(tensor, dtype) for tensor in linear)


def _plain_bytes(tensor: TensorSpec, dtype: str) -> int:
    return tensor.elements * DTYPE_BYTES[dtype]
