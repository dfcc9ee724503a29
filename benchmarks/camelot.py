"""What CAMELoT's bank brings to a window: perplexity beside the same window alone.

    python benchmarks/camelot.py --data DIR --tokens 4096 --window 128 --window 256

DIR holds books/moby_dick.txt and wikitext2_test.txt. Of each text the first `--chunks` pieces are
read; the loss is that of the tokens beyond `--beyond`, with the standard error of the difference,
token by token. For each `--window` of w tokens:

    alone     each segment of w tokens, read as a text of its own
    few       the same behind the first four tokens
    sliding   the w newest tokens and the first four
    faithful  the segment and a bank of all that is before it, as the paper's is understood here
    centred   the same, keys compared by what sets them apart
    best      as centred, recent tokens exactly as well, and the bank for what is before these
    as many   sliding, with as many bytes as `best`

Changes are against `alone`, which is always read; `--only` names other lines. `--technique` adds
settings, the segment w unless they name it, or another technique: as in
dms:window=640,predictor=window. With `--losses FOLDER` the losses of a line are kept there, and
what is there is not read again: a line of a whole book takes half an hour.
"""

import argparse
import io
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ullage import Recipe, Workload, build_plan, resolve, techniques
from ullage.measure.quality import figures
from ullage.measure.quality.perplexity import Piece, Reading, prepare, read
from ullage.measure.quality.sides import Side, attached
from ullage.measure.quality.suite import Asked
from ullage.measure.quality.texts import read_texts
from ullage.planner.memory import phase_footprints
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.load import load_model, load_tokenizer
from ullage.specs.blocks import block_bytes
from ullage.specs.device import find_device
from ullage.specs.survivors import SINKS
from ullage.specs.whole import write_whole
from ullage.specs.workload import Execution
from ullage.techniques.base import Technique
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS

MODEL = "smollm2-135m"
LINES = "few", "sliding", "faithful", "centred", "best", "as many"  # beside `alone`
Line = Callable[[torch.Tensor], Reading]  # of the tokens of a piece


def choices(window: int, recipe: Recipe, more: list[str]) -> dict[str, Technique]:
    """What is compared with a window alone."""
    best = CAMELoT(512, window, 0.8, recent=2 * window, centred=True)
    added = {
        words: techniques.parse(words if ":" in words else f"camelot:{words}") for words in more
    }
    return {
        "sliding": DMS(window=window, predictor="window"),
        "faithful": CAMELoT(512, window),
        "centred": CAMELoT(512, window, 0.8, centred=True),
        "best": best,
        "as many": same_bytes(best, recipe),
        **{
            words: replace(made, segment=window)
            if isinstance(made, CAMELoT) and "segment=" not in words
            else made
            for words, made in added.items()
        },
    }


def same_bytes(technique: Technique, recipe: Recipe) -> DMS:
    """The plain window that holds as many bytes as `technique` with all that this keeps."""
    chosen = replace(recipe, techniques=(techniques.choice_of(technique),))
    held_bytes = phase_footprints(chosen)["decode"].kv_bytes
    heads = recipe.model.num_layers * recipe.model.num_kv_heads
    blocks = held_bytes // (heads * block_bytes(recipe.model, recipe.execution.kv_dtype))
    return DMS(window=blocks * 16 - 16 * -(-SINKS // 16), predictor="window")


def behind(side: Side, ids: torch.Tensor) -> Reading:
    """All of `ids`, [T], in one sequence."""
    return read([side], ids)[0]


@torch.inference_mode()
def alone(side: Side, ids: torch.Tensor, *, window: int, sinks: int) -> Reading:
    """Each segment of `window` tokens of `ids`, [T], behind the first `sinks` and nothing else.
    These stand just before it, so that no distance is longer than the model was trained on."""
    losses, live_bytes = torch.empty(len(ids) - 1), 0  # in one piece, or the heap is full of holes
    for start in range(0, len(ids) - 1, window):
        before = min(start, sinks)
        own = torch.cat([ids[:before], ids[start : start + window + 1]])  # and the next one's first
        with side.open(len(own)) as sequence:
            logits = side.logits(sequence, own[:-1])[before:]
            losses[start : start + len(logits)] = cross_entropy(
                logits, own[before + 1 :], reduction="none"
            )
            live_bytes = max(live_bytes, side.live_bytes())
    return Reading(losses, torch.zeros(len(losses)), live_bytes)


def side(stack: ExitStack, model: PreTrainedModel, recipe: Recipe, technique: Technique) -> Side:
    """`model` with `technique` until `stack` ends."""
    chosen = replace(recipe, techniques=(techniques.choice_of(technique),))
    return Side(stack.enter_context(attached(model, [technique])), chosen)


def readings_of(line: Line, pieces: Iterable[Piece], file: Path | None) -> list[Reading]:
    """What `line` makes of each piece, as it is in `file`, or will be."""
    if file is None or not file.exists():
        readings = [line(piece.ids) for piece in pieces]
        if file is not None:
            content = io.BytesIO()
            losses = [one.losses.numpy() for one in readings]
            np.savez(content, *losses, live_bytes=readings[0].live_bytes)
            write_whole(file, content.getvalue())
        return readings
    with np.load(file) as found:
        live_bytes = int(found["live_bytes"])
        losses = [torch.from_numpy(found[name]) for name in found.files if name != "live_bytes"]
    return [Reading(one, torch.zeros(len(one)), live_bytes) for one in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--beyond", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--window", type=int, action="append")
    parser.add_argument("--text", action="append", help="one of the texts; all by default")
    parser.add_argument("--only", choices=LINES, action="append", help="all by default")
    parser.add_argument("--losses", type=Path, help="a folder that keeps each line's")
    parser.add_argument("--technique", action="append", default=[])
    asked = parser.parse_args()
    if asked.losses:
        asked.losses.mkdir(parents=True, exist_ok=True)
    spec, execution = resolve(MODEL), Execution(dtype="fp32", kv_dtype="fp32")
    recipe = Recipe(spec, find_device("cpu-16gb"), Workload(asked.tokens - 1, 1), execution)
    folder = weights_folder(spec)
    tokenizer = load_tokenizer(folder)
    texts = prepare(
        read_texts(asked.data), tokenizer, Asked(asked.tokens, asked.beyond, asked.chunks, seed=0)
    )
    print("| text | window | what | live KV | perplexity | change (se) | n |")
    print("|---|---|---|---|---|---|---|")
    model = load_model(build_plan(recipe), folder, tokenizer).model
    for window in asked.window or (128, 256, 512):
        known = choices(window, recipe, asked.technique)
        with ExitStack() as stack:
            segment = replace(recipe, workload=Workload(SINKS + window, 1))
            dense = Side(model, segment)
            lines = {
                "alone": partial(alone, dense, window=window, sinks=0),
                "few": partial(alone, dense, window=window, sinks=SINKS),
            } | {
                what: partial(behind, side(stack, model, recipe, choice))
                for what, choice in known.items()
                if not asked.only or what in (*asked.only, *asked.technique)
            }
            if asked.only and "few" not in asked.only:
                del lines["few"]
            for name in asked.text or texts:
                found = {}
                for what, line in lines.items():
                    shown = track(texts[name], f"{name} {window} {what}", transient=True)
                    of = f"{name}-{asked.chunks}x{asked.tokens}-{window}-{what}.npz"
                    file = asked.losses and asked.losses / of.replace("/", "_")
                    found[what] = readings_of(line, shown, file)
                report(f"{name} | {window}", found, asked.beyond)


def report(name: str, found: dict[str, list[Reading]], beyond: int) -> None:
    """A line a choice, the change against the window alone."""
    losses = {
        what: np.concatenate([one.losses[beyond:].double().numpy() for one in readings])
        for what, readings in found.items()
    }
    for what, readings in found.items():
        change = figures.perplexity_change(losses["alone"], losses[what])
        print(
            f"| {name} | {what} | {readings[0].live_bytes / 2**20:.1f} MiB "
            f"| {figures.perplexity(losses[what]).value:.2f} "
            f"| {change.value:+.2f}% ({change.error:.2f}%) | {change.n:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
