"""What DMS costs in perplexity, beside a plain window that holds as many bytes.

    python benchmarks/dms.py --data DIR --tokens 4096 --technique kept=0.45,window=512

DIR holds books/moby_dick.txt and wikitext2_test.txt. The first `--chunks` pieces of each text are
read in chunks of 512, dense and sparse; the loss is that of the tokens beyond `--beyond`, with the
standard error of the difference, token by token. Live bytes count windows, survivors and slack.
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ullage import ModelSpec, Recipe, Workload, build_plan, resolve, techniques
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import KVPool
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.load import load_model, load_tokenizer
from ullage.specs.blocks import sequence_blocks
from ullage.specs.device import find_device
from ullage.specs.workload import Execution
from ullage.techniques.dms.settings import DMS, SINKS

MODEL = "smollm2-135m"
TEXTS = {"moby_dick": "books/moby_dick.txt", "wikitext2_test": "wikitext2_test.txt"}
STARTS = {"moby_dick": "Call me Ishmael."}  # behind the header and the table of contents
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Read:
    """A text that was read: the loss of each token but the first, [T - 1], and its live bytes."""

    losses: torch.Tensor
    live_bytes: int


@torch.inference_mode()
def read(model: PreTrainedModel, spec: ModelSpec, ids: torch.Tensor, technique: DMS) -> Read:
    """`ids`, [T], in chunks over a fresh cache."""
    tokens = len(ids)
    pool = KVPool(2 * sequence_blocks(spec, tokens), spec.head_dim, torch.float32)
    cache = PagedCache(spec, pool, technique.rows(spec))
    sequence = cache.open(tokens)
    cache.activate([sequence])
    attached: AbstractContextManager[None] = technique.attach(model)
    with attached if technique.kept < 1 else nullcontext():
        losses = [
            F.cross_entropy(
                model(ids[None, at : at + CHUNK_TOKENS], **cache_argument(model, cache))
                .logits[0, : len(ids[at + 1 : at + CHUNK_TOKENS + 1])]
                .float(),
                ids[at + 1 : at + CHUNK_TOKENS + 1],
                reduction="none",
            )
            for at in range(0, tokens, CHUNK_TOKENS)
        ]
    live_bytes = cache.nbytes()
    sequence.close()
    return Read(torch.cat(losses), live_bytes)


def pieces(
    data: Path, name: str, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int
) -> Iterator[torch.Tensor]:
    """The first `count` pieces of a text, `tokens` each."""
    text = (data / TEXTS[name]).read_text(encoding="utf-8")
    text = text[text.find(STARTS.get(name, text[:1])) :]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    for number in range(count):
        yield ids[number * tokens : (number + 1) * tokens]


def same_bytes(technique: DMS, spec: ModelSpec, tokens: int) -> DMS:
    """The plain window that takes as many blocks in a layer as `technique`."""
    blocks = technique.held_blocks(spec, tokens) // (spec.num_layers * spec.num_kv_heads)
    return DMS(technique.kept, blocks * 16 - 16 * -(-SINKS // 16), "window")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--beyond", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--technique", default="kept=0.45,window=512")
    asked = parser.parse_args()
    technique = techniques.parse(f"dms:{asked.technique}")
    if not isinstance(technique, DMS):
        parser.error("this measures dms")
    spec, execution = resolve(MODEL), Execution(dtype="fp32", kv_dtype="fp32")
    folder = weights_folder(spec)
    work = Workload(asked.tokens - 1, 1)
    plan = build_plan(Recipe(spec, find_device("cpu-16gb"), work, execution))
    loaded = load_model(plan, folder, load_tokenizer(folder))
    choices = {
        "dense": DMS.neutral(),
        "dms": technique,
        "window": same_bytes(technique, spec, asked.tokens),
    }
    print("| text | what | live KV | of dense | perplexity | change (se) | n |")
    print("|---|---|---|---|---|---|---|")
    for name in TEXTS:
        found: dict[str, list[Read]] = {what: [] for what in choices}
        texts = list(pieces(asked.data, name, loaded.tokenizer, asked.tokens, asked.chunks))
        for ids in track(texts, description=name, transient=True):
            for what, choice in choices.items():
                found[what].append(read(loaded.model, spec, ids, choice))
        report(name, found, asked.beyond)


def report(name: str, found: dict[str, list[Read]], beyond: int) -> None:
    """A line a choice, the change against dense."""
    losses = {
        what: torch.cat([one.losses[beyond:] for one in reads]).double()
        for what, reads in found.items()
    }
    dense_bytes = found["dense"][0].live_bytes
    for what, reads in found.items():
        difference = losses[what] - losses["dense"]
        error = difference.std() / len(difference) ** 0.5
        print(
            f"| {name} | {what} | {reads[0].live_bytes / 2**20:.1f} MiB "
            f"| {reads[0].live_bytes / dense_bytes:.1%} | {losses[what].mean().exp():.2f} "
            f"| {difference.mean().expm1():+.2%} ({error:.2%}) | {len(difference):,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
