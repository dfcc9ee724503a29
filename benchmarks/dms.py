"""What DMS costs in perplexity, beside a plain window that holds as many bytes.

    python benchmarks/dms.py --data DIR --tokens 4096 --technique kept=0.45,window=512

`--technique` may be given again, to compare; the plain window is as large as the first, and the
last column says how much lower the first's perplexity is. `--kv-cache-dtype` may be given again
too: each technique in each format, as int8 and bf16; dense and the plain window are in fp32.

DIR holds books/moby_dick.txt and wikitext2_test.txt. The first `--chunks` pieces of each text are
read dense and sparse; the loss is that of the tokens beyond `--beyond`, with the standard error of
the difference, token by token. Live bytes count windows, survivors and slack. `ullage eval` has
more metrics and suites, for one technique.
"""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track
from transformers import PreTrainedModel

from ullage import Recipe, Workload, build_plan, resolve, techniques
from ullage.measure.quality import figures
from ullage.measure.quality.perplexity import Reading, prepare, read
from ullage.measure.quality.sides import Side, attached
from ullage.measure.quality.suite import Asked
from ullage.measure.quality.texts import read_texts
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.load import load_model, load_tokenizer
from ullage.specs.device import find_device
from ullage.specs.model import ModelSpec
from ullage.specs.survivors import SINKS
from ullage.specs.workload import Execution
from ullage.techniques.dms.settings import DMS

MODEL = "smollm2-135m"


def same_bytes(technique: DMS, spec: ModelSpec, tokens: int) -> DMS:
    """The plain window that takes as many blocks in a layer as `technique`."""
    blocks = technique.held_blocks(spec, tokens) // (spec.num_layers * spec.num_kv_heads)
    return DMS(technique.kept, blocks * 16 - 16 * -(-SINKS // 16), "window")


def side(
    stack: ExitStack, model: PreTrainedModel, recipe: Recipe, technique: DMS, kv_dtype: str
) -> Side:
    """`model` with `technique` and entries in `kv_dtype` until `stack` ends."""
    execution = replace(recipe.execution, kv_dtype=kv_dtype)
    chosen = replace(recipe, execution=execution, techniques=(techniques.choice_of(technique),))
    return Side(stack.enter_context(attached(model, [technique])), chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--beyond", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--technique", action="append", required=True)
    parser.add_argument("--kv-cache-dtype", choices=["fp32", "bf16", "int8"], action="append")
    asked = parser.parse_args()
    formats = asked.kv_cache_dtype or ["fp32"]
    spec, execution = resolve(MODEL), Execution(dtype="fp32", kv_dtype="fp32")
    work = Workload(asked.tokens - 1, 1)
    recipe = Recipe(spec, find_device("cpu-16gb"), work, execution)
    named = {words: techniques.parse(f"dms:{words}") for words in asked.technique}
    compared = {
        f"{words}, {kv_dtype}": (made.settled(spec, work, execution), kv_dtype)
        for words, made in named.items()
        if isinstance(made, DMS)
        for kv_dtype in formats
    }
    first = next(iter(compared))
    folder = weights_folder(spec)
    tokenizer = load_tokenizer(folder)
    texts = prepare(
        read_texts(asked.data), tokenizer, Asked(asked.tokens, asked.beyond, asked.chunks, seed=0)
    )
    choices = {
        "dense": (DMS.neutral(), "fp32"),
        "window": (same_bytes(compared[first][0], spec, asked.tokens), "fp32"),
        **compared,
    }
    print("| text | what | live KV | of dense | perplexity | change (se) | n | first, from it |")
    print("|---|---|---|---|---|---|---|---|")
    with ExitStack() as stack:
        model = load_model(build_plan(recipe), folder, tokenizer).model
        sides = [side(stack, model, recipe, *choice) for choice in choices.values()]
        for name, pieces in texts.items():
            readings = [read(sides, piece.ids) for piece in track(pieces, name, transient=True)]
            found = dict(zip(choices, zip(*readings, strict=True), strict=True))
            report(name, found, first, asked.beyond)


def report(name: str, found: dict[str, tuple[Reading, ...]], first: str, beyond: int) -> None:
    """A line a choice: the change against dense, and that of the choice `first` against it."""
    losses = {
        what: np.concatenate([one.losses[beyond:].double().numpy() for one in readings])
        for what, readings in found.items()
    }
    dense_bytes = found["dense"][0].live_bytes
    for what, readings in found.items():
        change = figures.perplexity_change(losses["dense"], losses[what])
        gain = figures.perplexity_change(losses[what], losses[first])
        live_bytes = readings[0].live_bytes
        print(
            f"| {name} | {what} | {live_bytes / 2**20:.1f} MiB | {live_bytes / dense_bytes:.1%} "
            f"| {figures.perplexity(losses[what]).value:.2f} "
            f"| {change.value:+.2f}% ({change.error:.2f}%) | {change.n:,} "
            f"| {gain.value:+.2f}% ({gain.error:.2f}%) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
