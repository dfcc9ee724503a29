"""A step's decode attention over what sparse rows keep, against the full cache in one call.

    python benchmarks/decode_attention.py                 # a CUDA GPU: Llama-3-8B, 32K, 8x
    python benchmarks/decode_attention.py --device cpu    # SmolLM2-135M, 8,000 tokens, 4x

A batch of random entries in several layers, taken in turns so that no cache holds them; heads keep
between half and one and a half times the mean, each in one stretch. The full cache is read by
torch's SDPA, a group's query heads packed as queries of one head: its fastest way. Medians of
`--repeats` passes over the layers; a ratio above 1 means that the sparse rows are faster. On a CPU
set GOMP_SPINCOUNT=5000, as ullage does where it is imported before torch: see kernels/threads.py.
"""

import argparse
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from ullage.kv.attention import kernel_for
from ullage.kv.kernels import Piece, reference

LAYERS = 4
# One in `times` tokens is kept.
Size = namedtuple("Size", "heads kv_heads head_dim tokens times dtype")
SIZES = {
    "cuda": Size(32, 8, 128, 32_768, 8, torch.bfloat16),
    "cpu": Size(9, 3, 64, 8_000, 4, torch.float32),
}


@dataclass(frozen=True)
class Layer:
    """A batch's queries [B, Hq, 1, D], its full cache [B, Hkv, T, D], and what its rows keep, as
    pieces for the rows' query heads one after the other."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pieces: list[Piece]

    def full(self, scale: float) -> torch.Tensor:
        packed = self.query.view(*self.keys.shape[:2], -1, self.keys.shape[3])
        return scaled_dot_product_attention(packed, self.keys, self.values, scale=scale)

    def sparse(self, scale: float) -> torch.Tensor:
        return kernel_for(self.query.device)(self.query.flatten(0, 1), self.pieces, scale, None)


def make_layer(size: Size, batch: int, device: str) -> Layer:
    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, size.head_dim, device=device, dtype=size.dtype)

    mean, group = size.tokens // size.times, size.heads // size.kv_heads
    pieces = []
    for head in range(batch * size.kv_heads):
        tokens = mean // 2 + head % size.kv_heads * mean // max(1, size.kv_heads - 1)
        heads = slice(head * group, (head + 1) * group)
        pieces.append(Piece(some(1, tokens), some(1, tokens), heads=heads))
    shape = (batch, size.kv_heads, size.tokens)
    return Layer(some(batch, size.heads, 1), some(*shape), some(*shape), pieces)


def timed(way: Callable[..., object], layers: list[Layer], scale: float, repeats: int) -> float:
    """Median seconds of a layer, the device's work included; two passes warm up."""
    times_s = []
    for _ in range(repeats + 2):
        start_s = time.perf_counter()
        for layer in layers:
            way(layer, scale)
        if layers[0].query.is_cuda:
            torch.cuda.synchronize()
        times_s.append((time.perf_counter() - start_s) / len(layers))
    return median(times_s[2:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--numba", action="store_true", help="its kernel too: pip install numba")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU; --device cpu compares the CPU kernel")  # exits with 2
    size = SIZES[asked.device]
    scale = size.head_dim**-0.5
    layers = [make_layer(size, asked.batch, asked.device) for _ in range(LAYERS)]
    exact = reference.attend(layers[0].query.flatten(0, 1), layers[0].pieces, scale)
    error = (layers[0].sparse(scale) - exact).abs().max()
    print(f"{size}, batch {asked.batch}; off the reference by {error:.1e} at most\n")
    full_s, ways = 0.0, [Layer.full, Layer.sparse]
    if asked.numba:
        from numba_kernel import attend

        def numba(layer: Layer, scale: float) -> torch.Tensor:
            return attend(layer.query.flatten(0, 1), layer.pieces, scale)

        print(f"numba is off by {(numba(layers[0], scale) - exact).abs().max():.1e} at most\n")
        ways.append(numba)
    print("| decode attention | ms a layer | ratio |\n|---|---|---|")
    for way in ways:
        taken_s = timed(way, layers, scale, asked.repeats)
        full_s = full_s or taken_s
        print(f"| {way.__name__} | {taken_s * 1e3:.3f} | {full_s / taken_s:.2f} |", flush=True)


if __name__ == "__main__":
    main()
