r"""A long stream through a model, in parts: perplexity, time and memory as it goes.

    python benchmarks/camelot_stream.py --tokens 1000000
    python benchmarks/camelot_stream.py --tokens 100000 --data DIR --technique camelot:segment=512
    python benchmarks/camelot_stream.py --tokens 32768 --data DIR --technique dms:kept=1

With DIR SmolLM2-135M reads books/moby_dick.txt, else a tiny random Llama reads random tokens. The
second command goes far past the 8,192 tokens that SmolLM2 was trained on; the third keeps every
entry there. The peak is the process's high-water mark of the part; it has grown since the part in
which the first 10,000 tokens ended.
"""

import argparse
import time
from math import exp
from pathlib import Path

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
    asked = parser.parse_args()
    return_freed_memory()
    technique = techniques.parse(asked.technique)
    model, spec, ids = stream(asked.tokens, asked.data)
    execution = Execution(dtype="fp32", kv_dtype="fp32")
    work = Workload(asked.tokens, 1)
    chosen = (techniques.choice_of(technique),)
    recipe = Recipe(spec, find_device("cpu-16gb"), work, execution, chosen)
    print("| tokens up to | perplexity | ms a token | KV, MiB | peak, MiB | grown |")
    print("|---|---|---|---|---|---|")
    with attached(model, [technique]) as changed:
        side = Side(changed, recipe)
        with side.open(asked.tokens + 1) as sequence:
            settled_bytes = 0
            for part in torch.split(ids, -(-len(ids) // asked.parts)):
                reset_high_water()
                loss, taken_s = read(side, sequence, part)
                peak_bytes = status_bytes().high_water_bytes
                if not settled_bytes and sequence.length >= SETTLED_TOKENS:
                    settled_bytes = peak_bytes
                grown = f"{peak_bytes / settled_bytes - 1:+.2%}" if settled_bytes else ""
                print(
                    f"| {sequence.length:,} | {exp(loss):.2f} | {taken_s / len(part) * 1e3:.3f} "
                    f"| {side.live_bytes() / 2**20:.1f} | {peak_bytes / 2**20:.1f} | {grown} |",
                    flush=True,
                )


def read(side: Side, sequence: Sequence, ids: torch.Tensor) -> tuple[float, float]:
    """The mean loss of the tokens of `ids`, [N], but the first of a chunk, and the seconds that
    reading them took.

    Raises:
        FloatingPointError: a loss that is no number.
    """
    total, scored, start_s = 0.0, 0, time.perf_counter()
    chunks = torch.split(ids, CHUNK_TOKENS)
    for chunk in track(chunks, f"{len(ids):,} tokens", transient=True):
        logits = side.logits(sequence, chunk)
        total += float(F.cross_entropy(logits[:-1], chunk[1:], reduction="sum"))
        scored += len(chunk) - 1
    if total != total:
        raise FloatingPointError("the loss is no number")
    return total / max(1, scored), time.perf_counter() - start_s


if __name__ == "__main__":
    main()
