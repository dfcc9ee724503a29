"""ullage run: go on from a prompt, inside a budget."""

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn

from ullage.cli.asked import PlanOptions
from ullage.cli.given import prompt_text, refuse_beside_plan
from ullage.cli.options import (
    AttentionOption,
    CalibrationOption,
    ChunkOption,
    DeviceOption,
    KvOption,
    MemoryOption,
    ModelArgument,
    RecipeOption,
    TechniqueOption,
    WeightsOption,
)
from ullage.cli.session import Session, progress_bar
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only
from ullage.runtime.temperature import refuse_temperature
from ullage.specs.plan import Plan, read_plan
from ullage.specs.sources import resolve
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.runtime.engine import Engine, Request

_LARGEST_SEED = (1 << 63) - 1


def run(
    model: ModelArgument,
    source: Annotated[
        str | None, typer.Argument(metavar="[-]", help="-: read the prompt from stdin.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")
    ] = False,
    memory: MemoryOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Write this many at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; else 0.001 to 1000.")
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=_LARGEST_SEED, help="Of the draws, where temperature is above 0."),
    ] = 0,
    plan: Annotated[
        Path | None, typer.Option(help="Run as this plan says, written by `ullage plan --json`.")
    ] = None,
    device: DeviceOption = None,
    weights: WeightsOption = None,
    kv_cache_dtype: KvOption = None,
    attention: AttentionOption = None,
    prefill_chunk: ChunkOption = None,
    technique: TechniqueOption = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
) -> None:
    """Run a model inside a byte budget that nothing exceeds.

    Weights, KV format and prefill chunk are chosen to fit where none is given. Text goes to stdout,
    the choice and the measured peak to stderr.
    """
    options = PlanOptions(
        device, memory, weights, kv_cache_dtype, attention, prefill_chunk, tuple(technique or ()),
        calibration=calibration,
    )  # fmt: skip
    refuse_temperature(temperature)
    spec = resolve(model)
    refuse_planned_only(spec)
    text = prompt_text(source, prompt, prompt_file)
    if plan is not None:
        refuse_beside_plan(options, recipe)
    session = Session(
        spec, options.with_recipe(recipe, spec), None if plan is None else read_plan(plan)
    )
    session.refuse_early(text, max_new_tokens)
    ids = session.tokenize(text, chat)
    made = session.plan_for(len(ids), max_new_tokens)
    output_tokens = made.recipe.workload.output_tokens
    with out_of_memory.explained():
        engine = session.load(made)
        with closing(engine.loaded):
            _stream(engine, ids, output_tokens, temperature, seed, made)


def _stream(
    engine: "Engine", ids: list[int], new_tokens: int, temperature: float, seed: int, plan: Plan
) -> None:
    import torch
    from transformers import TextStreamer

    from ullage.runtime.engine import Request
    from ullage.runtime.memory import peak_bytes

    streamer = TextStreamer(engine.loaded.tokenizer, skip_special_tokens=True)
    start_s = time.perf_counter()
    first_s = start_s
    with progress_bar("reading the prompt", MofNCompleteColumn(), len(ids)) as progress:
        task = progress.add_task("", total=len(ids))
        request = Request(
            ids, new_tokens, temperature, seed,
            on_prefill=lambda done, _: progress.update(task, completed=done),
        )  # fmt: skip
        tokens = engine.generate(request)
        first = next(tokens)
        first_s = time.perf_counter()
    streamer.put(torch.tensor([first]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    _summary(
        plan, request, first_s - start_s, time.perf_counter() - first_s, peak_bytes(engine.device)
    )


def _summary(
    plan: Plan, request: "Request", first_s: float, rest_s: float, measured_bytes: int
) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    rest = len(request.output_ids) - 1
    rate = f", then {rest / rest_s:.1f} tokens/s" if rest and rest_s > 0 else ""
    console.print(
        f"{len(request.prompt_ids):,} prompt tokens read in {first_s:.1f} s{rate}; planned peak "
        f"{format_bytes(plan.peak_bytes)}, measured {format_bytes(measured_bytes)} "
        f"({measured_bytes / plan.peak_bytes - 1:+.1%} of planned), "
        f"budget {format_bytes(plan.budget_bytes)}"
    )
