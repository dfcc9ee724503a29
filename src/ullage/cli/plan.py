"""ullage plan: will it fit, and where is the cliff?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ullage.cli.asked import PlanOptions, workload_of
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
    OutputLenOption,
    PpOption,
    RecipeOption,
    TechniqueOption,
    TpOption,
    UtilizationOption,
    WeightsOption,
)
from ullage.cli.show import answers, catalogs, is_wide
from ullage.cli.show.explored import (
    candidate_json,
    change_line,
    exploration_json,
    show_exploration,
    size_line,
    unmade_lines,
)
from ullage.cli.show.picture import draw_exploration
from ullage.cli.show.planned import show_plan
from ullage.cli.show.sums import show_best, sums, sums_table
from ullage.errors import DoesNotFit, InputError
from ullage.planner import build_plan
from ullage.planner.candidates import Candidate
from ullage.planner.explore import Exploration, Goal, best_plan, cheapest_change, explore
from ullage.specs.calibration import Calibration
from ullage.specs.device import Device, find_device
from ullage.specs.plan import Plan, Recipe
from ullage.specs.sources import resolve

# Where the context is what is searched for, the least that is asked of a combination.
_LEAST_CONTEXT_TOKENS = 8192


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A catalog name, a local folder, a config.json, a .gguf file, or a hub id.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = None,
    output_len: OutputLenOption = None,
    weights: WeightsOption = None,
    kv_cache_dtype: KvOption = None,
    attention: AttentionOption = None,
    prefill_chunk: ChunkOption = None,
    technique: TechniqueOption = None,
    recipe: RecipeOption = None,
    engine: EngineOption = "ullage",
    engine_version: EngineVersionOption = "",
    tp: TpOption = 1,
    pp: PpOption = 1,
    gpu_memory_utilization: UtilizationOption = None,
    calibration: CalibrationOption = None,
    goal: Annotated[
        Goal | None,
        typer.Option(
            help="Rank all combinations of what was left open by the longest context, the most "
            "sequences, or the speed at the asked size."
        ),
    ] = None,
    also_device: Annotated[
        list[str] | None,
        typer.Option(
            "--also-device", metavar="NAME|SIZE", help="Another that would do; may be given again."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --goal: a picture of memory, quality, latency; .svg or .png."),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Every line of the sum, its label and its source; with --goal, of the best.",
        ),
    ] = False,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="The catalog of models, and nothing else.")
    ] = False,
    list_devices: Annotated[
        bool, typer.Option("--list-devices", help="The catalog of devices, and nothing else.")
    ] = False,
    as_json: bool = typer.Option(False, "--json", help="The plan as JSON, for `run --plan`."),
) -> None:
    """Predict the peak of every phase and name the cliff, without weights.

    Exit code 0: fits, 1: does not fit, 2: wrong usage or input.
    """
    if list_models or list_devices:
        _list(list_models, as_json)
        return
    if model is None:
        raise InputError("Which model? Name one; --list-models shows the catalog.")
    if goal is None and plot is not None:
        raise InputError("--plot draws what --goal searches: give both.")
    options = PlanOptions(
        device, memory, weights, kv_cache_dtype, attention, prefill_chunk, tuple(technique or ()),
        engine, calibration, engine_version,
        # where the most is searched for, it is the least that is asked, and no server's limit
        None if goal == "concurrency" else max_num_seqs,
        tp, pp, gpu_memory_utilization,
    )  # fmt: skip
    spec, place = resolve(model), options.find_device()
    options = options.with_recipe(recipe, spec)
    if goal == "context" and max_model_len is None:
        max_model_len = str(min(_LEAST_CONTEXT_TOKENS, spec.max_context_tokens))
    workload = workload_of(spec, max_model_len, output_len, max_num_seqs or 1)
    asked = _Asked(
        recipe=options.recipe(spec, place, workload),
        budget_bytes=None if memory is None else options.budget_bytes(place),
        options=options,
        devices=[find_device(name) for name in also_device or ()],
        calibration=options.read_calibration(),
    )
    if goal is None:
        fits = asked.plan(explain, as_json)
    else:
        fits = asked.search(goal, plot, explain, as_json)
    raise typer.Exit(0 if fits else 1)


def _list(models: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(catalogs.models() if models else catalogs.devices(), indent=2))
        return
    console = answers()
    wide = is_wide(console)
    console.print(catalogs.models_table(wide) if models else catalogs.devices_table(wide))


@dataclass(frozen=True)
class _Asked:
    """What the options describe; each answer says whether anything fits."""

    recipe: Recipe
    budget_bytes: int | None
    options: PlanOptions
    devices: Sequence[Device]
    calibration: Calibration | None

    def plan(self, explain: bool, as_json: bool) -> bool:
        """Print the plan, and what would make it fit."""
        made = build_plan(self.recipe, self.budget_bytes, self.calibration)
        if as_json:
            typer.echo(json.dumps(self._json(made, explain), indent=2))
            return made.fits
        console = answers()
        show_plan(console, made, self.calibration)
        if explain:
            console.print(sums_table(made, self.calibration, is_wide(console)))
        if not made.fits:
            for line in (*self._advice(made), *unmade_lines(self.recipe)):
                console.print(line)
        return made.fits

    def search(self, goal: Goal, plot: Path | None, explain: bool, as_json: bool) -> bool:
        """Print what the search for `goal` found, and what would make the request fit as asked."""
        made = build_plan(self.recipe, self.budget_bytes, self.calibration)  # or refuses it
        explored = explore(
            self.recipe, self.budget_bytes, goal, self.options.freedom(), self.devices,
            self.calibration,
        )  # fmt: skip
        if plot is not None:
            draw_exploration(explored, plot)
        if as_json:
            typer.echo(json.dumps(self._search_json(explored, explain), indent=2))
            return bool(explored.ranked)
        console = answers()
        show_exploration(console, explored)
        best = best_plan(explored, self.calibration) if explain else None
        if best is not None:
            show_best(console, best, self._calibration_of(best))
        if not explored.every[0].fits:
            for line in self._advice(made):
                console.print(line)
        return bool(explored.ranked)

    def _search_json(self, explored: Exploration, explain: bool) -> dict[str, Any]:
        best = best_plan(explored, self.calibration)
        plan = None if best is None else self._plan_json(best, explain)
        return {**exploration_json(explored), "best": plan}

    def _plan_json(self, made: Plan, explain: bool) -> dict[str, Any]:
        data = made.to_json()
        if explain:
            data["explain"] = sums(made, self._calibration_of(made))
        return data

    def _calibration_of(self, made: Plan) -> Calibration | None:
        """The calibration, where it is of the plan's device: a search may take another."""
        known = self.calibration
        return known if known is not None and known.is_of(made.recipe.device) else None

    def _json(self, made: Plan, explain: bool) -> dict[str, Any]:
        data = self._plan_json(made, explain)
        if not made.fits:
            try:
                data["cheapest_change"] = candidate_json(self._change())
            except DoesNotFit as error:
                data["cheapest_change"], data["needed_bytes"] = None, error.needed_bytes
        return data

    def _advice(self, made: Plan) -> list[str]:
        try:
            lines = [change_line(self._change())]
        except DoesNotFit as error:
            lines = [str(error)]
        size = size_line(made.cliff, made.recipe)
        return lines if size is None else [*lines, size]

    def _change(self) -> Candidate:
        return cheapest_change(
            self.recipe, self.budget_bytes, self.options.freedom(), self.devices, self.calibration
        )
