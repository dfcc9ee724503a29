r"""A long stream through a model, in parts: perplexity, time and memory as it goes.

    python benchmarks/camelot_stream.py --tokens 1000000
    python benchmarks/camelot_stream.py --tokens 100000 --data DIR --technique camelot:segment=512
    python benchmarks/camelot_stream.py --tokens 32768 --data DIR --technique dms:kept=1

With DIR SmolLM2-135M reads books/moby_dick.txt, else a tiny random Llama reads random tokens. The
second command goes far past the 8,192 tokens that SmolLM2 was trained on; the third keeps every
entry there. The peak is the process's high-water mark of the part; it has grown since the part in
which the first 10,000 tokens ended.

A machine's speed changes while a long stream runs. With `--beside` each part is read twice, chunk
by chunk in turns: behind all that was before it, and behind the first part alone. The ratio of the
two times says whether the stream's length costs time; the peak is then that of three sequences.
"""

import argparse
import time
from contextlib import ExitStack, closing
from math import exp
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ullage import Recipe, Workload, build_plan, resolve, techniques
from ullage.kv import attention
from ullage.kv.cache import Sequence
from ullage.measure.quality.sides import CHUNK_TOKENS, Side, attached
from ullage.measure.quality.texts import read_texts
from ullage.runtime.allocator import return_freed_memory
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.load import load_model, load_tokenizer
from ullage.runtime.process import reset_high_water, status_bytes
from ullage.runtime.prompt import token_ids
from ullage.specs.device import find_device
from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec
from ullage.specs.workload import Execution

MODEL = "smollm2-135m"
SETTLED_TOKENS = 10_000


def tiny() -> PreTrainedModel:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        )
    )  # fmt: skip
    attention.register()
    model.eval().set_attn_implementation(attention.NAME)
    return model


def stream(tokens: int, data: Path | None) -> tuple[PreTrainedModel, ModelSpec, torch.Tensor]:
    """The model and what it reads, [tokens]."""
    if data is None:
        random = torch.Generator().manual_seed(0)
        model = tiny()
        spec = spec_from_config(model.config.to_dict(), name="tiny")
        return model, spec, torch.randint(256, (tokens,), generator=random)
    spec = resolve(MODEL)
    folder = weights_folder(spec)
    tokenizer = load_tokenizer(folder)
    ids = token_ids(read_texts(data)["moby_dick"], tokenizer)[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"moby_dick has {len(ids):,} tokens")
    execution = Execution(dtype="fp32", kv_dtype="fp32")
    work = Workload(CHUNK_TOKENS, 1)
    recipe = Recipe(spec, find_device("cpu-16gb"), work, execution)
    return load_model(build_plan(recipe), folder, tokenizer).model, spec, torch.tensor(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--technique", default="camelot:segment=512")
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--beside", action="store_true", help="time a short text in turns with it")
    asked = parser.parse_args()
    return_freed_memory()
    technique = techniques.parse(asked.technique)
    model, spec, ids = stream(asked.tokens, asked.data)
    execution = Execution(dtype="fp32", kv_dtype="fp32")
    work = Workload(asked.tokens, 1)
    chosen = (techniques.choice_of(technique),)
    recipe = Recipe(spec, find_device("cpu-16gb"), work, execution, chosen)
    print("| tokens up to | perplexity | ms a token | KV, MiB | peak, MiB | grown | ratio (se) |")
    print("|---|---|---|---|---|---|---|")
    parts = torch.split(ids, -(-len(ids) // asked.parts))
    with attached(model, [technique]) as changed, ExitStack() as stack:
        side, short = Side(changed, recipe), Side(changed, recipe)
        sequence = stack.enter_context(side.open(asked.tokens + 1))
        first = stack.enter_context(short.open(asked.tokens + 1)) if asked.beside else None
        settled_bytes = 0
        for index, part in enumerate(parts):
            reset_high_water()
            with ExitStack() as turn:
                ways = [(side, sequence)]
                if first is not None:
                    own = turn.enter_context(closing(first.copy())) if index else first
                    ways.append((short, own))
                loss, taken_s = read(ways, part)
            peak_bytes = status_bytes().high_water_bytes
            if not settled_bytes and sequence.length >= SETTLED_TOKENS:
                settled_bytes = peak_bytes
            grown = f"{peak_bytes / settled_bytes - 1:+.2%}" if settled_bytes else ""
            print(
                f"| {sequence.length:,} | {exp(loss):.2f} "
                f"| {taken_s[0].sum() / len(part) * 1e3:.3f} | {side.live_bytes() / 2**20:.1f} "
                f"| {peak_bytes / 2**20:.1f} | {grown} | {ratio(taken_s)} |",
                flush=True,
            )


def read(ways: list[tuple[Side, Sequence]], ids: torch.Tensor) -> tuple[float, np.ndarray]:
    """Read the tokens of `ids`, [N], into each sequence, chunk by chunk in turns: the mean loss of
    all but the first of a chunk in the first sequence, and the seconds that each took,
    [sequences, chunks].

    Raises:
        FloatingPointError: a loss that is no number.
    """
    chunks = torch.split(ids, CHUNK_TOKENS)
    losses, taken_s = [0.0] * len(ways), np.zeros((len(ways), len(chunks)))
    for index, chunk in enumerate(track(chunks, f"{len(ids):,} tokens", transient=True)):
        for way in sorted(range(len(ways)), reverse=index % 2 == 1):  # none is always the first
            side, sequence = ways[way]
            start_s = time.perf_counter()
            logits = side.logits(sequence, chunk)
            losses[way] += float(F.cross_entropy(logits[:-1], chunk[1:], reduction="sum"))
            taken_s[way, index] = time.perf_counter() - start_s
    if losses[0] != losses[0]:
        raise FloatingPointError("the loss is no number")
    return losses[0] / max(1, len(ids) - len(chunks)), taken_s


def ratio(taken_s: np.ndarray) -> str:
    """The first sequence's time over the second's, with the standard error over chunks."""
    if len(taken_s) < 2:
        return ""
    ratios = taken_s[0] / taken_s[1]
    return f"{ratios.mean():.3f} ({ratios.std(ddof=1) / len(ratios) ** 0.5:.3f})"


if __name__ == "__main__":
    main()
