"""Every combination of the levers: what fits, ranked, and the front of memory, quality, latency."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from sys import maxsize
from typing import Literal

from ullage import techniques
from ullage.errors import DoesNotFit, InputError, TechniqueError
from ullage.planner.build import build_plan, settle
from ullage.planner.candidates import Candidate, expense, front_of, rank
from ullage.planner.engines import ENGINES
from ullage.planner.latency import estimate
from ullage.planner.levers import Lever, Setting, combinations, levers_of
from ullage.planner.memory import phase_footprints, serving_bytes
from ullage.planner.reach import longest_context, most_sequences
from ullage.planner.search import Freedom, as_memory_option
from ullage.specs.calibration import Calibration
from ullage.specs.device import Device
from ullage.specs.plan import Plan, Recipe

Goal = Literal["context", "concurrency", "latency"]


@dataclass(frozen=True)
class Exploration:
    """`every` combination, the asked one first; `ranked` what fits, best first; `front` what no
    other beats in memory, quality and latency at once, whether it fits or not, by memory: on the
    asked hardware, where anything fits there."""

    goal: Goal
    every: tuple[Candidate, ...]
    ranked: tuple[Candidate, ...]
    front: tuple[Candidate, ...]

    def best(self, count: int) -> list[Candidate]:
        """The first `count` of the ranking, without those that only add changes to a better one."""
        found: list[Candidate] = []
        for candidate in self.ranked:
            if len(found) == count:
                break
            if not any(candidate.adds_nothing_to(better) for better in found):
                found.append(candidate)
        return found

    @property
    def front_is_of_asked_hardware(self) -> bool:
        """Whether other hardware, which the front says nothing of, was tried."""
        others = any(found.hardware for found in self.every)
        return others and not any(found.hardware for found in self.front)

    def elsewhere(self) -> list[Candidate]:
        """The best on each other device, with as few of it as will do."""
        found: dict[str, Candidate] = {}
        for candidate in sorted(self.ranked, key=lambda one: one.recipe.execution.tensor_parallel):
            if candidate.recipe.device != self.every[0].recipe.device:
                found.setdefault(candidate.recipe.device.name, candidate)
        return list(found.values())

    def shown_front(self, count: int) -> list[Candidate]:
        """Of the front what fits, by memory; of more than `count` those that are feared to lose the
        least."""
        fitting = [found for found in self.front if found.fits]
        least = sorted(fitting, key=lambda found: found.feared_percent)[:count]
        return sorted(least, key=lambda found: found.peak_bytes)


def explore(
    recipe: Recipe,
    budget_bytes: int | None,
    goal: Goal,
    freedom: Freedom,
    devices: Sequence[Device] = (),
    calibration: Calibration | None = None,
) -> Exploration:
    """All combinations around `recipe` inside `budget_bytes` of each device (default: what the
    engine takes of it). Ranked by `goal`, then the cost in quality, then latency; what takes other
    or more devices comes after all that does not, and there the changes that lose more than
    `TOLERABLE_PERCENT`, or nobody knows how much, after those that do not.

    Raises:
        TechniqueError, InputError: `recipe` itself is none that can be planned.
    """
    settle(recipe)  # or refuses it
    levers = levers_of(recipe, freedom, devices)
    every = _candidates(combinations(recipe, levers), budget_bytes, calibration)
    fitting = [_reaching(found, goal, calibration) for found in every if found.fits]
    here = [found for found in every if not found.hardware]
    front = front_of(here if any(found.fits for found in here) else every)
    return Exploration(goal, tuple(every), tuple(sorted(fitting, key=rank)), front)


def best_plan(explored: Exploration, calibration: Calibration | None = None) -> Plan | None:
    """The plan of the best that fits, at the size that it reaches; None where nothing fits."""
    if not explored.ranked:
        return None
    best = explored.ranked[0]
    recipe, work = best.recipe, best.recipe.workload
    if best.reach is not None and explored.goal == "context":
        work = replace(work, prompt_tokens=best.reach - work.output_tokens)
    elif best.reach is not None:
        work = replace(work, sequences=best.reach)
    recipe = replace(recipe, workload=work)
    return build_plan(recipe, best.budget_bytes, _measured(calibration, recipe))


def cheapest_change(
    recipe: Recipe,
    budget_bytes: int | None,
    freedom: Freedom,
    devices: Sequence[Device] = (),
    calibration: Calibration | None = None,
) -> Candidate:
    """The one lever to move so that `recipe` fits: the least loss of quality, then of latency. What
    can be run goes before what can only be planned, and both before other or more devices. Where no
    single change is enough, the cheapest combination.

    Raises:
        DoesNotFit: no combination fits; carries the smallest budget that would.
    """
    settle(recipe)  # or refuses it
    levers = levers_of(recipe, freedom, devices)
    for moves in (_one_moved(recipe, levers), combinations(recipe, levers)):
        found = _candidates(moves, budget_bytes, calibration)
        if fitting := [candidate for candidate in found if candidate.fits]:
            return min(fitting, key=expense)
    needed_bytes = min(candidate.peak_bytes for candidate in found)
    raise DoesNotFit(
        f"No combination fits: the smallest budget that works is {as_memory_option(needed_bytes)}.",
        needed_bytes=needed_bytes,
    )


def _candidates(
    moves: Iterable[tuple[Recipe, tuple[Setting, ...]]],
    budget_bytes: int | None,
    calibration: Calibration | None,
) -> list[Candidate]:
    found = (_candidate(made, settings, budget_bytes, calibration) for made, settings in moves)
    return [candidate for candidate in found if candidate is not None]


def _one_moved(recipe: Recipe, levers: list[Lever]) -> Iterator[tuple[Recipe, tuple[Setting, ...]]]:
    for moved in levers:
        yield from combinations(
            recipe,
            [
                Lever(lever.name, lever.settings[1:] if lever is moved else lever.settings[:1])
                for lever in levers
            ],
        )


def _candidate(
    recipe: Recipe,
    settings: tuple[Setting, ...],
    budget_bytes: int | None,
    calibration: Calibration | None,
) -> Candidate | None:
    """What `settings` made `recipe`, None where the engine or a technique does not take it. It
    keeps what its techniques were asked for, which other lengths settle otherwise."""
    engine = ENGINES[recipe.execution.engine]
    try:
        recipe = engine.settle(recipe)
        chosen = techniques.settled(recipe).techniques
    except InputError:
        return None
    budget_bytes = budget_bytes or engine.limit_bytes(recipe)
    recipe = engine.within(recipe, budget_bytes)
    settled = replace(recipe, techniques=chosen)
    phases = phase_footprints(settled, _measured(calibration, recipe))
    return Candidate(
        recipe=recipe,
        budget_bytes=budget_bytes,
        peak_bytes=max(part.total_bytes for part in phases.values()),
        latency=estimate(settled, phases),
        changes=tuple(setting.typed for setting in settings if setting.typed),
        change_costs=tuple(setting.cost for setting in settings if setting.typed),
        costs=tuple(setting.cost for setting in settings if not setting.cost.free),
        runs=all(setting.runs for setting in settings),
        hardware=any(setting.hardware for setting in settings),
    )


def _measured(calibration: Calibration | None, recipe: Recipe) -> Calibration | None:
    """The calibration where it is of the recipe's device: others were not measured."""
    same = calibration is not None and calibration.is_of(recipe.device)
    return calibration if same else None


def _reaching(found: Candidate, goal: Goal, calibration: Calibration | None) -> Candidate:
    """`found` with how far it reaches."""
    if goal == "latency":
        return found
    reach = longest_context if goal == "context" else most_sequences

    def peak(recipe: Recipe) -> int:
        try:
            recipe = techniques.settled(recipe)
        except TechniqueError:  # too long for what a technique may take
            return maxsize
        return serving_bytes(recipe, _measured(calibration, recipe))

    return replace(found, reach=reach(found.recipe, found.peak_bytes, found.budget_bytes, peak))
