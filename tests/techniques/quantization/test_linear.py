"""Int8 layers: their arithmetic, and the one buffer that they widen into."""

import pytest
import torch
from torch import nn

from ullage.techniques.quantization.linear import Int8Linear, Scratch, quantizer


def test_layers_of_one_model_widen_into_one_buffer_and_compute_as_apart() -> None:
    torch.manual_seed(0)
    convert = quantizer("int8")
    plain = [nn.Linear(8, 24), nn.Linear(24, 8, bias=False), nn.Linear(8, 40)]
    layers = [convert(layer) for layer in plain]
    x = torch.randn(3, 8)
    found, expected = x, x
    for layer in layers:
        assert isinstance(layer, Int8Linear)
        found = layer(found)
        product = nn.functional.linear(expected, layer.weight.float()) * layer.scale
        expected = product if layer.bias is None else product + layer.bias
        assert torch.equal(found, expected)
    for layer, original in zip(layers, plain, strict=True):
        widened = layer.weight * layer.scale[:, None]
        assert (widened - original.weight).abs().max() <= layer.scale.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_buffer_is_as_large_as_the_largest_weight(dtype: torch.dtype) -> None:
    scratch = Scratch()
    small, large = torch.ones(2, 3, dtype=torch.int8), torch.full((4, 5), 7, dtype=torch.int8)
    for weight in (small, large, small):
        widened = scratch.widened(weight, dtype)
        assert widened.dtype == dtype
        assert torch.equal(widened, weight.to(dtype))
    assert widened.untyped_storage().nbytes() == large.numel() * dtype.itemsize
