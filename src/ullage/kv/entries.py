"""Entries: what tokens leave in the cache, in the format in which a pool stores it.

Of int8 and fp8 (e4m3) numbers those of one token's K in one KV head, and likewise of its V, share a
scale: the largest stands for 127 or 448, the most that the format has. Rounding happens once, when
entries are made; from then on they are copied as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ullage.specs.blocks import BLOCK_TOKENS

# As wide as fp32 in range, so that no scale overflows; and exact in bf16 arithmetic.
_SCALE = torch.bfloat16
_MOST = {torch.int8: 127, torch.float8_e4m3fn: 448}


@dataclass(frozen=True)
class Entries:
    """K and V of T tokens, [Hkv, T, D] each; numbers in int8 and fp8 have scales, [Hkv, T], that
    they are to be multiplied by."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that there are, in the order of the fields."""
        if self.key_scales is None or self.value_scales is None:
            return self.keys, self.values
        return self.keys, self.values, self.key_scales, self.value_scales

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Entries":
        """The same change to all tensors, whose first two axes are alike."""
        return Entries(*map(change, self.tensors))

    def part(self, tokens: slice, heads: slice = slice(None)) -> "Entries":
        """Some of the tokens, of some of the KV heads, as views."""
        return self.each(lambda tensor: tensor[heads, tokens])

    def at(self, tokens: torch.Tensor) -> "Entries":
        """Copies of the tokens at indices, [R]."""
        return self.each(lambda tensor: bits(tensor)[:, tokens].view(tensor.dtype))

    def keys_in(self, dtype: torch.dtype) -> torch.Tensor:
        """K as real numbers, [Hkv, T, D]; not a copy where it is in `dtype` already."""
        return _widened(self.keys, self.key_scales, dtype)

    def values_in(self, dtype: torch.dtype) -> torch.Tensor:
        """V, likewise."""
        return _widened(self.values, self.value_scales, dtype)


def room_for(blocks: int, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> Entries:
    """Memory for `blocks` blocks, [blocks, BLOCK_TOKENS, D]; what is in it is of no meaning. It can
    be written to wherever it was made."""
    shape = (blocks, BLOCK_TOKENS)
    with torch.inference_mode(False):
        numbers = [torch.empty(*shape, head_dim, dtype=dtype, device=device) for _ in range(2)]
        if dtype not in _MOST:
            return Entries(*numbers)
        scales = [torch.empty(shape, dtype=_SCALE, device=device) for _ in range(2)]
        return Entries(*numbers, *scales)


def stored(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> Entries:
    """Real numbers, [Hkv, T, D] each, rounded as a pool of `dtype` stores them."""
    if dtype not in _MOST:
        return Entries(keys.to(dtype), values.to(dtype))
    (keys, key_scales), (values, value_scales) = (_quantized(x, dtype) for x in (keys, values))
    return Entries(keys, values, key_scales, value_scales)


def side_by_side(parts: Sequence[Entries], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of `parts`, one behind the other, as real numbers, [Hkv, all T, D] each."""
    heads, _, head_dim = parts[0].keys.shape
    shape = (heads, sum(map(len, parts)), head_dim)
    keys, values = (parts[0].keys.new_empty(shape, dtype=dtype) for _ in range(2))
    at = 0
    for part in parts:
        span = slice(at, at + len(part))
        _widen(part.keys, part.key_scales, keys[:, span])
        _widen(part.values, part.value_scales, values[:, span])
        at = span.stop
    return keys, values


def bits(numbers: torch.Tensor) -> torch.Tensor:
    """To be copied by indices: of fp8 its bytes, as CUDA looks up no fp8."""
    return numbers.view(torch.uint8) if numbers.dtype == torch.float8_e4m3fn else numbers


def _quantized(numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """In `dtype`, and the scales."""
    most = _MOST[dtype]
    largest = numbers.abs().amax(-1).float()
    scales = (largest / most).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
    steps = torch.div(numbers, scales[..., None].float()).clamp_(-most, most)
    if dtype == torch.int8:
        steps.round_()  # where fp8 is rounded as it is made, int8 would be cut off
    return steps.to(dtype), scales


def _widened(
    numbers: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    if scales is None:
        return numbers.to(dtype)
    return _widen(numbers, scales, torch.empty_like(numbers, dtype=dtype))


def _widen(numbers: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Into `out`, in its format. In fp16 the product is rounded and the scale is not: scales of
    small numbers are below what it holds."""
    out.copy_(numbers)
    if scales is None:
        return out
    dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
    return out.mul_(scales[..., None].to(dtype))
