"""Linear layers in int8 (torchao) and NF4 (bitsandbytes)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ullage.errors import TechniqueError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def quantized(model: "PreTrainedModel", scheme: str) -> Iterator[None]:
    """`model` with its layers' projections in `scheme`; the originals come back at the end.

    Raises:
        TechniqueError: the model has no such projections.
    """
    originals = dict(projections(model)) if scheme != "none" else {}
    if scheme != "none" and not originals:
        raise TechniqueError(f"{type(model).__name__} has no linear layers to quantize.")
    try:
        if originals:
            quantize = quantizer(scheme)
            for name, linear in originals.items():
                replace_module(model, name, quantize(linear))
        yield
    finally:
        for name, linear in originals.items():
            replace_module(model, name, linear)


def projections(model: "PreTrainedModel") -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that quantization converts, by name: all but the output head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantizer(scheme: str) -> Callable[[Any], nn.Module]:
    """Makes of a linear layer one that computes it from weights in `scheme`; the layer itself stays
    as it is. The library for it is imported here, before any weight is there.

    Raises:
        TechniqueError: that library is not installed.
    """
    library = {"int8": "torchao.quantization", "nf4": "bitsandbytes.nn"}[scheme]
    try:
        import_module(library)
    except ImportError as error:
        raise TechniqueError(
            f"{scheme} weights need {error.name}: pip install 'ullage[quant]'."
        ) from error
    return _nf4 if scheme == "nf4" else partial(_int8, scratch=Scratch())


class Scratch:
    """One buffer that layers widen their weights into, one after the other. A fresh one each time
    would cost more in page faults than the product itself, for a single token eight times as
    much."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def widened(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`weight` in `dtype`, good until the next call."""
        buffer, size = self._buffer, weight.numel()
        if (
            buffer is None
            or buffer.numel() < size
            or (buffer.dtype, buffer.device) != (dtype, weight.device)
        ):
            self._buffer = None  # never both at once
            self._buffer = buffer = torch.empty(size, dtype=dtype, device=weight.device)
        return buffer[:size].view(weight.shape).copy_(weight)


def _int8(linear: nn.Linear, scratch: Scratch) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    copy = _shell(linear)
    copy.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    quantize_(copy, Int8WeightOnlyConfig())
    packed: Any = copy.weight  # torchao's tensor class
    scale = packed.scale[:, 0].to(linear.weight.dtype)  # torchao keeps fp32 whatever the weight is
    return Int8Linear(packed.qdata, scale, linear.bias, scratch)


class Int8Linear(nn.Module):
    """y = (x W^T) s + b with W in int8, [out, in], and a scale s a row, [out] in x's format.

    torchao's own tensor class costs several times as much for a single token. torch's int8 kernel
    would be faster still, but rounds to bf16, so that a row's result would hang on its batch.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: nn.Parameter | None,
        scratch: Scratch,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        self.bias = bias
        self._scratch = scratch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        weight = self._scratch.widened(self.weight, x.dtype)
        product = F.linear(x, weight).mul_(self.scale)
        return product if self.bias is None else product.add_(self.bias)


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # On CPUs with AVX512-BF16 the first forward would repack the weights and compute in bf16: a
    # second copy that no plan holds, and other results on other machines.
    layer.support_avx512bf16_for_cpu = False
    params = Params4bit(
        weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    layer.weight = params.to(weight.device)
    layer.bias = linear.bias
    layer.eval()
    return layer  # type: ignore[no-any-return]


def _shell(linear: nn.Linear) -> nn.Linear:
    """A linear layer of the same shape and bias, without a weight of its own."""
    shell = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    shell.bias = linear.bias
    return shell.eval()


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's storage; of a quantized one, those of its parts (``nbytes`` and
    ``get_memory_footprint`` report the shape that it stands for)."""
    quant_state = getattr(tensor, "quant_state", None)
    if quant_state is not None:
        parts = quant_state.as_dict(packed=False).values()
        held = sum(tensor_bytes(part) for part in parts if isinstance(part, torch.Tensor))
        return tensor.numel() * tensor.element_size() + held + 4  # + the offset, a 0-d tensor
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
