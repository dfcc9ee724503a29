"""A bank beside what else the same bytes can hold: perplexity, with `--memory` entries a head.

    python benchmarks/camelot_equals.py --data DIR --tokens 4096 --memory 256 --memory 1024

Of `--memory` M entries a bank has half as its slots; the others are exact, a quarter of M the
segment and a quarter the tokens before it. Beside it, each in no more bytes than that:

    recency    the newest tokens and the first four
    unmerged   as the bank, but nothing is merged: what leaves the exact ones lies there as is
    dms        windows and survivors by head, as the shipped adapter and its linear predictor
               choose

DIR holds books/moby_dick.txt and wikitext2_test.txt; the first `--chunks` pieces of each are read,
and the loss is that of the tokens beyond `--beyond`. The last columns say how much
higher the perplexity is than that of recency and of what is unmerged, with the standard error
of the difference, token by token.
"""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track

from camelot import MODEL, same_bytes, side
from ullage import Recipe, Workload, build_plan, resolve, techniques
from ullage.measure.quality import figures
from ullage.measure.quality.perplexity import Reading, prepare, read
from ullage.measure.quality.suite import Asked
from ullage.measure.quality.texts import read_texts
from ullage.planner.memory import phase_footprints
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.load import load_model, load_tokenizer
from ullage.specs.device import find_device
from ullage.specs.workload import Execution
from ullage.techniques.base import Technique
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS


def choices(memory: int, recipe: Recipe) -> dict[str, Technique]:
    """What is compared, recency first."""
    quarter = memory // 4
    bank = CAMELoT(2 * quarter, quarter, 0.8, recent=quarter, centred=True)
    chosen = replace(recipe, techniques=(techniques.choice_of(bank),))
    held_bytes = phase_footprints(chosen)["decode"].kv_bytes
    budget = f"{held_bytes}B"
    dms = DMS(window=round(0.7 * memory), predictor="linear", adapter=MODEL, budget=budget)
    return {
        "recency": same_bytes(bank, recipe),
        "bank": bank,
        "unmerged": replace(bank, threshold=2.0),
        "dms": dms.settled(recipe.model, recipe.workload, recipe.execution),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--beyond", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--memory", type=int, action="append")
    asked = parser.parse_args()
    spec, execution = resolve(MODEL), Execution(dtype="fp32", kv_dtype="fp32")
    recipe = Recipe(spec, find_device("cpu-16gb"), Workload(asked.tokens - 1, 1), execution)
    folder = weights_folder(spec)
    tokenizer = load_tokenizer(folder)
    texts = prepare(
        read_texts(asked.data), tokenizer, Asked(asked.tokens, asked.beyond, asked.chunks, seed=0)
    )
    print(
        "| text | entries | what | live KV | perplexity | from recency (se) | from unmerged | n |"
    )
    print("|---|---|---|---|---|---|---|---|")
    model = load_model(build_plan(recipe), folder, tokenizer).model
    for memory in asked.memory or (128, 256, 512, 1024, 2048):
        known = choices(memory, recipe)
        with ExitStack() as stack:
            sides = [side(stack, model, recipe, choice) for choice in known.values()]
            for name, pieces in texts.items():
                shown = track(pieces, f"{name} {memory}", transient=True)
                readings = zip(*[read(sides, piece.ids) for piece in shown], strict=True)
                report(f"{name} | {memory}", dict(zip(known, readings, strict=True)), asked.beyond)


def report(where: str, found: dict[str, tuple[Reading, ...]], beyond: int) -> None:
    """A line a choice."""
    losses = {
        what: np.concatenate([one.losses[beyond:].double().numpy() for one in readings])
        for what, readings in found.items()
    }
    for what, readings in found.items():
        changes = [
            figures.perplexity_change(losses[other], losses[what])
            for other in ("recency", "unmerged")
        ]
        columns = " | ".join(f"{change.value:+.2f}% ({change.error:.2f}%)" for change in changes)
        print(
            f"| {where} | {what} | {readings[0].live_bytes / 2**20:.1f} MiB "
            f"| {figures.perplexity(losses[what]).value:.2f} | {columns} | {changes[0].n:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
