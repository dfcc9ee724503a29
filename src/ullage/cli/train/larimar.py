"""ullage train larimar: what a model's entries of facts have in common, from facts."""

import hashlib
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track

from ullage.cli.asked import PlanOptions
from ullage.cli.machine import device_to_run
from ullage.cli.options import DeviceOption, ModelArgument
from ullage.cli.train.steps import say, stderr, steps_shown
from ullage.cli.written import refuse_undrawable, refuse_unwritable
from ullage.errors import InputError, TechniqueError
from ullage.measure.picture import draw_training
from ullage.planner import build_plan
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only, weights_folder
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan
from ullage.specs.sources import resolve
from ullage.specs.workload import Workload
from ullage.techniques.larimar.adapter import LIMIT_BYTES, Adapter
from ullage.techniques.larimar.asked_facts import AskedFact, read_asked_facts
from ullage.techniques.larimar.settings import READ_TOKENS, unsupported

if TYPE_CHECKING:
    from ullage.techniques.larimar.training import Point

_RANK = 128
_BESIDE_BYTES = 64 << 10  # of an adapter: all but its mean and basis


def larimar(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Facts: the .json and .jsonl files in it or in its folder facts, but none named "
            "after a test or an edit: objects of prompt, subject, answer, perhaps rephrase_prompt.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The adapter.")] = Path(
        "larimar.safetensors"
    ),
    facts: Annotated[int, typer.Option(min=8, help="How many to learn from, at most.")] = 1200,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Numbers to keep of an entry. Default: 128, or what goes into 10 MiB."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Of the training, eight facts each.")] = 1000,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the losses, .svg or .png.", show_default=False),
    ] = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was found as JSON.")] = False,
) -> None:
    """Train a readout of facts that keeps little of each, for
    `larimar:readout=latent,adapter=FILE`.

    The model reads each fact once; what differs most among their entries is found in closed form,
    and then trained so that the model answers behind it. Broken off, the same command reads the
    facts again and goes on with the steps where it was.
    """
    refuse_unwritable(output)
    if plot is not None:
        refuse_undrawable(plot)
        if not steps:
            raise InputError("--plot is of a training, and --steps 0 asks for none.")
    spec = resolve(model)
    refuse_planned_only(spec)
    if (reason := unsupported(spec)) is not None:
        raise TechniqueError(f"larimar cannot act on this model: {reason}")
    kept = _rank(rank, spec)
    learned = read_asked_facts(data, facts)
    work = Workload(READ_TOKENS, 1)
    plan = build_plan(PlanOptions(device).recipe(spec, device_to_run(device), work))
    adapter, points = _trained(plan, learned, kept, steps, output)
    if plot is not None:
        draw_training(
            [point.loss for point in points], "loss of answers, nats a token",
            [point.lost for point in points], "lost of entries", plot,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(adapter.record, indent=2))
    told = "".join(f", {name} {value:.3f}" for name, value in _last(points).items())
    say(f"{len(learned):,} facts, {len(points):,} steps{told}.")
    say(f"Adapter in {output}; use it by")
    chosen = f"larimar:ledger=DB,readout=latent,adapter={output}"
    say(f"  --technique {shlex.quote(chosen)}")


def _rank(asked: int | None, spec: ModelSpec) -> int:
    """
    Raises:
        InputError: the adapter would be too large, or a latent larger than an entry.
    """
    width = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    most = (LIMIT_BYTES - _BESIDE_BYTES) // (2 * width) - 1  # in fp16, beside the mean
    if most < 1:
        raise InputError(f"An entry of {spec.name} is too large for an adapter of 10 MiB.")
    if asked is not None and asked > min(most, width):
        said = f"holds {most} at most, in 10 MiB" if most < width else f"needs no more than {width}"
        raise InputError(f"--rank {asked}: an adapter of {spec.name} {said}.")
    return asked or min(_RANK, most, width)


def _trained(
    plan: Plan, learned: list[AskedFact], rank: int, steps: int, output: Path
) -> "tuple[Adapter, list[Point]]":
    """The adapter, in its file, and the steps that it took."""
    from ullage.kv.fingerprint import fingerprint
    from ullage.runtime.load import load_model, load_tokenizer
    from ullage.techniques.larimar.training import (
        SAVED_STEPS,
        Examples,
        Saved,
        Trainer,
        fitted,
        trained,
    )

    folder = weights_folder(plan.recipe.model)
    tokenizer = load_tokenizer(folder)
    record: dict[str, Any] = {
        "model": plan.recipe.model.name,
        "facts": len(learned),
        "facts_sha256": _sha256(learned),
        "rank": rank,
        "steps": steps,
    }
    state = output.with_name(output.name + ".training")
    with out_of_memory.explained():
        model = load_model(plan, folder, tokenizer).model
        print_of_model = fingerprint(model)
        saved = Saved.found(state, json.dumps(record | {"fingerprint": print_of_model}))
        made = Examples(model, tokenizer)
        shown = track(learned, "reading", console=stderr(), transient=True)
        examples = list(made.of(shown))
        basis = fitted(examples, rank, model.device)
        trainer = Trainer(model, basis, examples, made.turns, steps)
        with steps_shown(steps, "loss {loss:.3f}  lost {lost:.1%}", loss=0.0, lost=0.0) as bar:

            def watch(point: "Point") -> None:
                bar.made(SAVED_STEPS, **asdict(point))

            trained(trainer, saved, watch, bar.resumed)
    record |= {"rank": len(basis.rows)} | _last(trainer.history)  # few facts have few entries
    adapter = trainer.basis.adapter(print_of_model, record)
    adapter.save(output)
    state.unlink(missing_ok=True)
    return adapter, trainer.history


def _last(points: "list[Point]") -> dict[str, float]:
    """The mean of the last tenth of them: an episode has few facts."""
    last = points[-max(1, len(points) // 10) :]
    if not last:
        return {}
    return {
        name: sum(asdict(point)[name] for point in last) / len(last) for name in ("loss", "lost")
    }


def _sha256(learned: list[AskedFact]) -> str:
    digest = hashlib.sha256()
    for asked in learned:
        digest.update(json.dumps([asked.fact.content, asked.questions]).encode())
    return digest.hexdigest()
