"""Every combination of the levers: what fits, ranked, and the front of memory, quality, latency."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from sys import maxsize
from typing import Literal

from ullage import techniques
from ullage.errors import DoesNotFit, InputError, TechniqueError
from ullage.planner.build import build_plan, settle
from ullage.planner.costs import Cost
from ullage.planner.engines import ENGINES
from ullage.planner.latency import estimate
from ullage.planner.levers import Lever, Setting, combinations, levers_of
from ullage.planner.memory import phase_footprints, serving_bytes
from ullage.planner.reach import longest_context, most_sequences
from ullage.planner.search import Freedom, as_memory_option
from ullage.specs.calibration import Calibration
from ullage.specs.device import Device
from ullage.specs.latency import Latency
from ullage.specs.plan import Plan, Recipe

Goal = Literal["context", "concurrency", "latency"]
# What four-bit weights with KV entries of eight bits lose: changes that lose more, or nobody knows
# what, do not lead for being fast or small.
TOLERABLE_PERCENT = 5.0


@dataclass(frozen=True)
class Candidate:
    """One combination at the asked workload. `changes` are its settings other than the asked ones,
    as typed, and `change_costs` what each of them costs; `costs` are all that is not free, what was
    asked for too.

    `reach` is what the goal counts: tokens of the longest context, or the most sequences, that fit;
    None for the goal of latency, and where the combination does not fit.
    """

    recipe: Recipe
    budget_bytes: int
    peak_bytes: int
    latency: Latency | None
    changes: tuple[str, ...]
    change_costs: tuple[Cost, ...]
    costs: tuple[Cost, ...]
    runs: bool
    hardware: bool
    reach: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the peak stays inside the budget."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def cost_percent(self) -> float | None:
        """The single costs added up, an estimate: nobody measured the combination. None where one
        of them is not known."""
        return None if _has_unknown(self.costs) else self.known_percent

    @property
    def known_percent(self) -> float:
        """As much of `cost_percent` as is known."""
        return sum(cost.percent or 0.0 for cost in self.costs)

    @property
    def feared_percent(self) -> float:
        """What the changes may lose, unknown ones as much as is tolerated; 0 where all is known and
        tolerable. What was asked for is not held against it."""
        feared = sum(
            TOLERABLE_PERCENT if cost.percent is None else cost.percent
            for cost in self.change_costs
        )
        tolerable = feared <= TOLERABLE_PERCENT and not _has_unknown(self.change_costs)
        return 0.0 if tolerable else feared


def _has_unknown(costs: Sequence[Cost]) -> bool:
    return any(cost.percent is None for cost in costs)


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
            if not any(_adds_nothing(candidate, better) for better in found):
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


def _adds_nothing(found: Candidate, better: Candidate) -> bool:
    """Whether `found`, ranked after `better`, has all of its changes and more, for nothing."""
    return (
        set(found.changes) > set(better.changes)
        and (found.reach or 0) <= (better.reach or 0)
        and _loss(found) >= _loss(better)
        and _step_s(found) >= _step_s(better)
    )


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
    front = _front(here if any(found.fits for found in here) else every)
    return Exploration(goal, tuple(every), tuple(sorted(fitting, key=_rank)), front)


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
            return min(fitting, key=_expense)
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


def _rank(found: Candidate) -> tuple[float, ...]:
    """The asked hardware, then what can be trusted, then the farthest, or without a reach the
    fastest, then the least known loss, the fastest, the simplest."""
    step_s = _step_s(found)
    goal = step_s if found.reach is None else -found.reach
    return (found.hardware, found.feared_percent, goal, _loss(found), step_s, len(found.changes))


def _expense(found: Candidate) -> tuple[float, ...]:
    execution = found.recipe.execution
    devices = execution.tensor_parallel * execution.pipeline_parallel
    price = (found.hardware, devices, not found.runs, found.feared_percent, _loss(found))
    return (*price, _step_s(found), len(found.changes))


def _loss(found: Candidate) -> float:
    """The cost in percent; unknown is the worst."""
    return inf if found.cost_percent is None else found.cost_percent


def _step_s(found: Candidate) -> float:
    """Seconds a token, with a prompt's share in it: the asked workload from end to end."""
    latency, work = found.latency, found.recipe.workload
    if latency is None:
        return 0.0
    prompts_s = latency.ttft_s * work.sequences
    return prompts_s / work.output_tokens + 1 / latency.sequence_tokens_per_s


def _front(every: list[Candidate]) -> tuple[Candidate, ...]:
    """What is not beaten, nor equalled, in all three; of equals the one with the fewest changes."""
    front: list[Candidate] = []
    best: list[tuple[float, float]] = []
    order = sorted(
        every, key=lambda found: (found.peak_bytes, _loss(found), _step_s(found), found.changes)
    )
    for found in order:
        mine = (_loss(found), _step_s(found))
        if not any(loss <= mine[0] and step_s <= mine[1] for loss, step_s in best):
            front.append(found)
            best.append(mine)
    return tuple(front)
