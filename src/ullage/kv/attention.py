"""The attention function and the mask function that transformers calls under the name "ullage"."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from ullage.errors import InputError
from ullage.kv.before import Attend
from ullage.kv.entries import stored
from ullage.kv.kernels import Kernel, Piece, cpu, reference
from ullage.kv.pool import Place
from ullage.kv.rows import NewTokens, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullage.kv.cache import Beside, PagedLayer

NAME = "ullage"


class Handed(torch.Tensor):
    """New keys on their way from `Cache.update` to attention, with the cache layer that holds their
    past: transformers hands attention what that returned, and nothing else of the cache. Any other
    attention, which would see the new tokens alone, is an error."""

    keys: torch.Tensor
    layer: "PagedLayer"

    @classmethod
    def on(cls, keys: torch.Tensor, layer: "PagedLayer") -> "Handed":
        """`keys`, for `layer`."""
        handed = keys.as_subclass(cls)
        handed.keys, handed.layer = keys, layer
        return handed

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise InputError(
            "This cache is read by ullage's own attention: go on inside the `with` in which it was "
            "filled, or after model.set_attn_implementation('ullage')."
        )


@torch.no_grad()
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of new tokens over a PagedCache. Without gradients: it is for inference.

    Args:
        query: [B, Hq, N, D]; key and value: [B, Hkv, N, D], new tokens only.
        attention_mask: None, or bool [B, >= N] of which the last N columns are False at padding.

    Returns:
        [B, N, Hq, D], and None for the attention weights, which are never built.

    Raises:
        RuntimeError: no PagedCache holds the past, or one of another number of sequences.
        BudgetExceeded: a sequence for which no room was reserved finds none in the pool; the cache
            cannot go on.
    """
    if not isinstance(key, Handed):
        raise RuntimeError("attention 'ullage' reads a PagedCache: pass one with cache_argument")
    layer, key = key.layer, key.keys
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = kernel_for(query.device)

    def attend(queries: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        return kernel(queries, pieces, scale, softcap)

    batch, _, new_tokens, _ = query.shape
    real = _real_tokens(attention_mask, new_tokens)
    step = _Step(query, key, value, scale, layer.take_beside(), real)
    rows = layer.rows_of_step(batch, new_tokens)
    output = step.together(rows, attend) if new_tokens == 1 else step.one_by_one(rows, attend)
    return output, None


@dataclass(frozen=True)
class _Step:
    """The new tokens of a batch in one layer. `real` has, for each row, the places of those that
    are no padding; None where none is."""

    query: torch.Tensor  # [B, Hq, N, D]
    keys: torch.Tensor  # [B, Hkv, N, D]
    values: torch.Tensor  # [B, Hkv, N, D]
    scale: float
    beside: "Beside"
    real: list[torch.Tensor] | None

    def reading(self) -> Iterator[tuple[int, NewTokens]]:
        """The rows that have new tokens, and these."""
        batch = len(self.query)
        own = (part.unbind() for part in (self.query, self.keys, self.values))
        told = (
            [None] * batch if part is None else part.expand(batch, -1, -1).unbind()
            for part in self.beside
        )
        for index, (query, keys, values, *rest) in enumerate(zip(*own, *told, strict=True)):
            new = NewTokens(query, keys, values, self.scale, *rest)
            if self.real is None:
                yield index, new
            elif len(self.real[index]):
                yield index, new.at(self.real[index])

    def together(self, rows: list[Row], attend: Attend) -> torch.Tensor:
        """A token a row, in one call of the kernel, for which they are further heads of one query:
        [B, 1, Hq, D]."""
        batch, heads, _, head_dim = self.query.shape
        new = list(self.reading())
        if not new:
            return self._zeros()
        reading, whole = [index for index, _ in new], len(new) == batch
        query, keys, values = (
            (part if whole else part[reading]).flatten(0, 1)
            for part in (self.query, self.keys, self.values)
        )
        places: list[Place] = []
        pieces: list[Piece] = []
        for first, (index, one) in zip(count(step=heads), new, strict=False):
            taken = rows[index].take(one, first)
            places += taken.places
            pieces += rows[index].pieces(taken, one.heads(first))
        pool = rows[0].pool
        pool.store(places, stored(keys, values, pool.dtype))
        read = attend(query, pieces).view(-1, 1, heads, head_dim)
        if whole:
            return read
        output = self._zeros()
        output[reading] = read
        return output

    def one_by_one(self, rows: list[Row], attend: Attend) -> torch.Tensor:
        """Each row by itself, so that what is laid out for it is there once: [B, N, Hq, D]."""
        output = self._zeros()
        for index, new in self.reading():
            places = slice(None) if self.real is None else self.real[index]
            output[index, places] = rows[index].attend(new, attend).transpose(0, 1)
        return output

    def _zeros(self) -> torch.Tensor:
        batch, heads, tokens, head_dim = self.query.shape
        return self.query.new_zeros((batch, tokens, heads, head_dim))


def _real_tokens(mask: torch.Tensor | None, new_tokens: int) -> list[torch.Tensor] | None:
    """`_Step.real` by a mask as `attention_forward` gets it. Looked up once a step, as the device
    is awaited for it: the layers are given the same mask."""
    if mask is None:
        return None
    known = getattr(mask, "ullage_real", None)
    if known is None or known[0] != new_tokens:
        known = new_tokens, _places(mask[:, -new_tokens:].cpu(), mask.device)
        mask.ullage_real = known  # type: ignore[attr-defined]
    return known[1]


def _places(real: torch.Tensor, device: torch.device) -> list[torch.Tensor] | None:
    """Where each row of `real`, [B, N] on the host, is True; None where all is."""
    if bool(real.all()):
        return None
    return [row.nonzero()[:, 0].to(device) for row in real]


def attention_modules(model: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """The modules that attend in `model`, each with the number of its layer."""
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if name.endswith("attn") and layer is not None:
            yield layer, module


def kernel_for(device: torch.device) -> Kernel:
    """The fastest kernel that there is for `device`. Triton comes with torch for CUDA, but not on
    Windows; for a CPU it is never imported, as it takes 80 MiB."""
    if device.type == "cpu":
        return cpu.attend
    if device.type == "cuda":
        with suppress(ImportError):
            from ullage.kv.kernels import triton

            return triton.attend
    return reference.attend


def register() -> None:
    """Make attention and mask known to transformers. Both: without the mask function padding would
    silently be attended to."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


@contextmanager
def of_ours(model: "PreTrainedModel") -> Iterator[None]:
    """`model` with this attention, and with its own again behind it."""
    before = model.config._attn_implementation
    if before == NAME:
        yield
        return
    register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
