"""ullage plan: will it fit, and where is the cliff?"""

import json
from dataclasses import replace

import typer
from rich.console import Console
from rich.table import Table

from ullage.cli.options import (
    AttentionOption,
    CalibrationOption,
    ChunkOption,
    DeviceOption,
    EngineOption,
    EngineVersionOption,
    KvOption,
    MaxModelLenOption,
    MaxNumSeqsOption,
    MemoryOption,
    ModelArgument,
    OutputLenOption,
    PlanOptions,
    PpOption,
    TechniqueOption,
    TpOption,
    UtilizationOption,
    WeightsOption,
    workload_of,
)
from ullage.errors import DoesNotFit
from ullage.planner import build_plan, fit_run
from ullage.planner.search import Freedom, describe
from ullage.specs.calibration import Calibration
from ullage.specs.plan import Plan
from ullage.specs.sources import resolve
from ullage.specs.workload import Engine
from ullage.units import format_bytes


def plan(
    model: ModelArgument,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = None,
    output_len: OutputLenOption = None,
    weights: WeightsOption = None,
    kv_cache_dtype: KvOption = None,
    attention: AttentionOption = "sdpa",
    prefill_chunk: ChunkOption = None,
    technique: TechniqueOption = None,
    engine: EngineOption = "ullage",
    engine_version: EngineVersionOption = "",
    tp: TpOption = 1,
    pp: PpOption = 1,
    gpu_memory_utilization: UtilizationOption = None,
    calibration: CalibrationOption = None,
    as_json: bool = typer.Option(False, "--json", help="The plan as JSON, for `run --plan`."),
) -> None:
    """Predict the peak of every phase and name the cliff, without weights.

    Exit code 0: fits, 1: does not fit, 2: wrong usage or input.
    """
    options = PlanOptions(
        device, memory, weights, kv_cache_dtype, attention, prefill_chunk, tuple(technique or ()),
        engine, calibration, engine_version, max_num_seqs, tp, pp, gpu_memory_utilization,
    )  # fmt: skip
    spec, place = resolve(model), options.find_device()
    workload = workload_of(spec, max_model_len, output_len, max_num_seqs or 1)
    calibrated = options.read_calibration()
    budget_bytes = None if memory is None else options.budget_bytes(place)
    made = build_plan(options.recipe(spec, place, workload), budget_bytes, calibrated)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2))
    else:
        _show(made, options.freedom(), calibrated)
    raise typer.Exit(0 if made.fits else 1)


def _show(plan: Plan, freedom: Freedom, calibration: Calibration | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    recipe, work = plan.recipe, plan.recipe.workload
    console.print(
        f"{recipe.model.name} ({recipe.model.parameters / 1e6:,.1f}M parameters) on "
        f"{recipe.device.name}, budget {format_bytes(plan.budget_bytes)}"
    )
    console.print(
        f"{work.sequences} x ({work.prompt_tokens:,} prompt + {work.output_tokens:,} output "
        f"tokens), {describe(recipe)}"
    )
    console.print(_phase_table(plan, wide=console.width >= 110))
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    spare = plan.budget_bytes - plan.peak_bytes
    console.print(
        f"Peak {format_bytes(plan.peak_bytes)}: {verdict}, "
        f"{format_bytes(abs(spare))} {'to spare' if spare >= 0 else 'too much'}."
    )
    for line in (*_cliff_lines(plan), *_attention_lines(plan, calibration)):
        console.print(line)
    if not plan.fits:
        console.print(_advice(plan, freedom, calibration))


def _phase_table(plan: Plan, wide: bool) -> Table:
    table = Table("phase", box=None, pad_edge=False)
    for column in ("weights", "KV", "scratch", "logits", "runtime", "total"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("of budget" if wide else "", justify="right", no_wrap=True)
    for name, part in plan.phases.items():
        sizes = (
            part.weights_bytes, part.kv_bytes, part.activation_bytes, part.logits_bytes,
            part.overhead_bytes, part.total_bytes,
        )  # fmt: skip
        share = part.total_bytes / plan.budget_bytes
        table.add_row(name, *(format_bytes(size) for size in sizes), _bar(share, 20 * wide))
    return table


def _bar(share: float, width: int) -> str:
    filled = min(width, round(share * width))
    color = "green" if share <= 1 else "red"
    return f"[{color}]{'█' * filled}{'░' * (width - filled)}[/] {share:.0%}"


def _cliff_lines(plan: Plan) -> list[str]:
    cliff, work, model = plan.cliff, plan.recipe.workload, plan.recipe.model
    if cliff.max_model_len == 0:
        return ["Cliff: not even the shortest prompt fits."]
    beyond = ""
    if cliff.max_model_len is not None and cliff.max_model_len >= model.max_context_tokens:
        beyond = f", beyond the model's own context of {model.max_context_tokens:,}"
    return [
        f"Cliff: with {_count(work.sequences, 'sequence')} the first context that fails is "
        f"{_first_to_fail(cliff.max_model_len, 'token')}{beyond}.",
        f"       At {work.context_tokens:,} tokens the first batch that fails is "
        f"{_first_to_fail(cliff.max_num_seqs, 'sequence')}.",
        f"       Each token more holds {plan.kv_bytes_per_token:,} bytes of KV.",
    ]


def _first_to_fail(largest: int | None, noun: str) -> str:
    return "none" if largest is None else _count(largest + 1, noun)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _of_engine(calibration: Calibration | None, engine: Engine) -> Calibration | None:
    """The calibration where it is of `engine`: what another engine takes was not measured."""
    return calibration if calibration is not None and calibration.engine == engine else None


def _attention_lines(plan: Plan, calibration: Calibration | None) -> list[str]:
    """What the score matrix would do to the same request, read in one pass as transformers does."""
    lines: list[str] = []
    calibration = _of_engine(calibration, "transformers")
    for attention in ("eager", "sdpa"):
        execution = replace(
            plan.recipe.execution, engine="transformers", attention=attention, prefill_chunk=0
        )
        other = build_plan(
            replace(plan.recipe, execution=execution), plan.budget_bytes, calibration
        )
        prefill = other.phases["prefill"]
        lines.append(
            f"{'One pass, ' if not lines else '          '}{attention + ':':<6} prefill peaks at "
            f"{format_bytes(prefill.total_bytes)} ({format_bytes(prefill.activation_bytes)} of it "
            f"activations and scores), first fails at "
            f"{_first_to_fail(other.cliff.max_model_len, 'token')}."
        )
    return lines


def _advice(plan: Plan, freedom: Freedom, calibration: Calibration | None) -> str:
    execution = replace(plan.recipe.execution, engine="ullage", attention="sdpa")
    recipe = replace(plan.recipe, execution=execution)
    try:
        known = _of_engine(calibration, "ullage")
        choice = fit_run(recipe, plan.budget_bytes, freedom, known)
    except DoesNotFit as error:
        return str(error)
    return (
        f"In ullage it would fit with {describe(choice.recipe)}: {format_bytes(choice.peak_bytes)}."
    )
