"""ullage train dms: what DMS has to know of a model, from texts."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import track

from ullage.cli.asked import PlanOptions
from ullage.cli.machine import device_to_run
from ullage.cli.options import DeviceOption, ModelArgument
from ullage.cli.show.shares import show_shares
from ullage.cli.train.lesson import Lesson, length_in, refuse_idle, trained
from ullage.cli.train.steps import say, stderr
from ullage.cli.written import refuse_undrawable, refuse_unwritable
from ullage.errors import InputError, TechniqueError
from ullage.measure.picture import draw_training
from ullage.measure.quality.texts import read_training_texts
from ullage.planner import build_plan
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only, weights_folder
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan
from ullage.specs.sources import resolve
from ullage.specs.workload import Workload
from ullage.techniques.dms.adapter import (
    ADAPTERS,
    CAPPED,
    Adapter,
    holds_trained,
)
from ullage.techniques.dms.settings import DMS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ullage.techniques.dms.training import Point

_TOKENS = 8192


def dms(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Texts: its .txt files, and those in its folder books, but none to test with.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The adapter.")] = Path(
        "dms.safetensors"
    ),
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Length of a piece: 4096, 8K. Default: what the model reads, 8192 at most.",
        ),
    ] = None,
    pieces: Annotated[int, typer.Option(min=1, help="Pieces of text, from all files in turn.")] = 6,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="RATIO",
            help="Train a predictor, too, for a cache that many times smaller: 8x.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the training, a text each. Default: 100.")
    ] = None,
    step_tokens: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Length of a step's text. Default: 2048."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw loss and kept share, .svg or .png.", show_default=False
        ),
    ] = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was found as JSON.")] = False,
) -> None:
    """Measure how far back each KV head of a model has to look and what tells which entries it will
    miss beyond, for `dms:adapter=FILE` and `predictor=linear`.

    Reads each piece once, forward and back: a minute or two a piece of 8,192 tokens on a small
    model and two cores. Every other piece says again some of what it said. With --to, a predictor
    is trained from there on, for `predictor=dms`; broken off, the same command goes on where it
    was. What FILE holds is not measured again; one with a trained predictor is left as it is.
    """
    refuse_unwritable(output)
    _refuse_trained(output)
    if plot is not None:
        refuse_undrawable(plot)
    if to is None:
        refuse_idle({"--plot": plot, "--steps": steps, "--step-tokens": step_tokens})
    spec = resolve(model)
    refuse_planned_only(spec)
    _refuse_model(spec)
    length = length_in("--tokens", tokens or str(min(_TOKENS, spec.max_context_tokens)), spec)
    lesson = None if to is None else Lesson.asked(to, steps, step_tokens, spec)
    texts = read_training_texts(data)
    work = Workload(length - 1, 1)
    plan = build_plan(PlanOptions(device).recipe(spec, device_to_run(device), work))
    adapter, points = _adapter(plan, texts, length, pieces, lesson, output)
    if plot is not None:
        draw_training(
            [point.divergence for point in points], "KL divergence, nats a token",
            [point.kept for point in points], "kept beyond the window", plot,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(adapter.record | {"windows": adapter.windows}, indent=2))
    else:
        show_shares(adapter, spec.max_context_tokens)
    predictor = "linear" if lesson is None else "dms"
    chosen = f"dms:adapter={output},predictor={predictor},window=TOKENS"
    say(f"Adapter in {output}; use it by")
    say(f"  --technique {shlex.quote(chosen)}")


def _refuse_trained(output: Path) -> None:
    """A training takes hours, and its steps' texts may be gone: nothing is written over it."""
    if holds_trained(output):
        raise InputError(
            f"{output} holds a trained predictor, which would be lost: name another --output, or "
            "remove the file."
        )


def _refuse_model(spec: ModelSpec) -> None:
    reason = DMS().unsupported(spec)
    if reason is not None:
        raise TechniqueError(f"dms cannot act on this model: {reason}")
    if spec.softcap is not None:
        raise TechniqueError(CAPPED)


def _adapter(
    plan: Plan,
    texts: dict[str, str],
    length: int,
    count: int,
    lesson: Lesson | None,
    output: Path,
) -> "tuple[Adapter, list[Point]]":
    """The adapter, in its file, and the steps that it took."""
    from ullage.runtime.load import load_model, load_tokenizer

    folder = weights_folder(plan.recipe.model)
    tokenizer = load_tokenizer(folder)
    pieces = _pieces(texts, tokenizer, "--tokens", length, count)
    lessons = {}
    if lesson is not None:
        lessons = _pieces(texts, tokenizer, "--step-tokens", lesson.tokens, lesson.steps)
    state = output.with_name(output.name + ".training")
    with out_of_memory.explained():
        model = load_model(plan, folder, tokenizer).model
        adapter = _measured(plan, model, pieces, output)
        if lesson is None:
            return adapter, []
        adapter, points = trained(plan, model, lessons, lesson, adapter, state)
    adapter.save(output)
    state.unlink()
    return adapter, points


def _measured(
    plan: Plan, model: "PreTrainedModel", pieces: "dict[str, torch.Tensor]", output: Path
) -> Adapter:
    """As it is in `output`, once it is there, unless what is there was measured on the same."""
    from ullage.kv.fingerprint import fingerprint
    from ullage.techniques.dms.fingerprint import texts_fingerprint
    from ullage.techniques.dms.measure import measure

    texts, path = list(pieces.values()), str(output.absolute())  # and no shipped adapter's name
    record = {
        "model": plan.recipe.model.name,
        "tokens": len(texts[0]),
        "pieces": list(pieces),
        "texts_sha256": texts_fingerprint(texts),
    }
    with suppress(TechniqueError):
        found = ADAPTERS.load(path)
        if found.record.items() >= record.items() and found.fingerprint == fingerprint(model):
            return found
    shown = track(texts, "reading", console=stderr(), transient=True)
    measure(model, shown, record).save(output)
    return ADAPTERS.load(path)  # rounded, as a training that goes on will find it


def _pieces(
    texts: dict[str, str],
    tokenizer: "PreTrainedTokenizerBase",
    option: str,
    length: int,
    count: int,
) -> "dict[str, torch.Tensor]":
    """Every other one recalls what it said before."""
    from ullage.measure.quality.tokens import pieces_in_turn, recalling

    found = pieces_in_turn(tokenizer, texts, length, count)
    if not found:
        raise InputError(f"No text is {length:,} tokens long: ask for fewer with {option}.")
    return {
        f"{name}, recalling" if at % 2 else name: recalling(ids, at) if at % 2 else ids
        for at, (name, ids) in enumerate(found.items())
    }
