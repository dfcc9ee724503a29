"""ullage eval: what a technique costs in quality, against the dense model in the same run."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ullage import techniques
from ullage.cli.asked import PlanOptions
from ullage.cli.machine import device_to_run
from ullage.cli.options import DeviceOption, KvOption, ModelArgument, TechniqueOption, WeightsOption
from ullage.cli.show.evaluated import show_evaluation
from ullage.cli.written import refuse_undrawable
from ullage.errors import InputError
from ullage.measure.quality.suite import READERS, Asked, Found
from ullage.planner import build_plan
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only, weights_folder
from ullage.specs.evaluation import Evaluation, Suite
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.sources import resolve
from ullage.specs.workload import Workload
from ullage.units import parse_tokens

_LARGEST_SEED = (1 << 32) - 1


def eval(
    model: ModelArgument,
    suite: Annotated[Suite, typer.Option(help="What is measured.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="perplexity: texts; glue: the folder glue; retrieval: the folder essays.",
            show_default=False,
        ),
    ],
    technique: TechniqueOption = None,
    tokens: Annotated[
        str, typer.Option(metavar="TOKENS", help="Length of the longest sequence: 4096, 8K.")
    ] = "4096",
    beyond: Annotated[
        str,
        typer.Option(
            metavar="TOKENS", help="perplexity: score what has more tokens than that before it."
        ),
    ] = "512",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pieces of a text, or examples of a task. Default: 4 pieces, 100 examples of a "
            "GLUE task; retrieval: 40 questions of a form, in eights.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=_LARGEST_SEED, help="Of what is drawn of the data.")
    ] = 0,
    device: DeviceOption = None,
    weights: WeightsOption = None,
    kv_cache_dtype: KvOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="A picture of the figures; .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """Measure what techniques cost in quality: the same inputs, dense and compressed, in one run,
    each with its live KV bytes, and the difference with its paired standard error.

    --weights and --kv-cache-dtype are those of both sides.
    """
    asked = Asked(parse_tokens(tokens), parse_tokens(beyond), limit, seed)
    typed = tuple(technique or ())
    options = PlanOptions(device, None, weights, kv_cache_dtype, technique=typed)
    if not typed:
        raise InputError("There is nothing to compare: name a --technique, as dms:kept=0.5.")
    if plot is not None:
        refuse_undrawable(plot)
    spec = resolve(model)
    refuse_planned_only(spec)
    _refuse_long(asked.tokens, spec, typed)
    inputs = READERS[suite](data)
    place = device_to_run(device)
    work = Workload(asked.tokens - 1, 1)
    dense, compressed = (
        build_plan(one.recipe(spec, place, work)).recipe  # or refuses it
        for one in (replace(options, technique=()), options)
    )
    found = _run(suite, inputs, dense, compressed, asked)
    done = _evaluation(suite, dense, _as_run(typed, compressed), asked, found)
    if plot is not None:
        from ullage.measure.quality.picture import draw_evaluation

        draw_evaluation(done, plot)
    if as_json:
        typer.echo(json.dumps(done.to_json(), indent=2))
    else:
        show_evaluation(Console(highlight=False), done)


def _refuse_long(tokens: int, model: ModelSpec, typed: Sequence[str]) -> None:
    """The dense side reads what is beyond the model's own context, too, as badly as it does."""
    most = max(techniques.parse(text).most_tokens(model) for text in typed)
    if tokens > most:
        raise InputError(
            f"--tokens {tokens:,} is more than the {most:,} that {model.name} can read."
        )


def _run(suite: Suite, inputs: Any, dense: Recipe, compressed: Recipe, asked: Asked) -> Found:
    from ullage.runtime.allocator import return_freed_memory

    return_freed_memory()
    from ullage.measure.quality.run import evaluate

    folder = weights_folder(dense.model)
    with out_of_memory.explained(), _progress() as progress:
        task = progress.add_task("reading weights", total=None)

        def on_step(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        return evaluate(suite, inputs, dense, compressed, folder, asked, on_step)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}", markup=False),  # files name their tasks
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def _as_run(typed: tuple[str, ...], settled: Recipe) -> tuple[str, ...]:
    """Each technique as typed, or, where the lengths settled what was typed, as it ran."""
    ran = {choice.name: choice for choice in settled.techniques}
    asked = [(text, techniques.choice_of(techniques.parse(text))) for text in typed]
    return tuple(
        text if choice == ran[choice.name] else techniques.as_typed(ran[choice.name])
        for text, choice in asked
    )


def _evaluation(
    suite: Suite, recipe: Recipe, typed: tuple[str, ...], asked: Asked, found: Found
) -> Evaluation:
    return Evaluation(
        suite=suite,
        model=recipe.model.name,
        parameters=recipe.model.parameters,
        device=recipe.device.name,
        dtype=recipe.execution.dtype,
        kv_dtype=recipe.execution.kv_dtype,
        techniques=typed,
        tokens=asked.tokens,
        beyond_tokens=asked.beyond_tokens if suite == "perplexity" else 0,
        seed=asked.seed,
        comparisons=tuple(found.comparisons),
        cells=tuple(found.cells),
    )
