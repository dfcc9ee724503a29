"""A combination of the levers with what it takes and costs, and which of two is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ullage.planner.costs import Cost
from ullage.specs.latency import Latency
from ullage.specs.plan import Recipe

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

    @property
    def loss_percent(self) -> float:
        """The cost in percent; unknown is the worst."""
        return inf if self.cost_percent is None else self.cost_percent

    @property
    def step_s(self) -> float:
        """Seconds a token, with a prompt's share in it: the asked workload from end to end."""
        latency, work = self.latency, self.recipe.workload
        if latency is None:
            return 0.0
        prompts_s = latency.ttft_s * work.sequences
        return prompts_s / work.output_tokens + 1 / latency.sequence_tokens_per_s

    def adds_nothing_to(self, better: "Candidate") -> bool:
        """Whether it, ranked after `better`, has all changes of that and more, for nothing."""
        return (
            set(self.changes) > set(better.changes)
            and (self.reach or 0) <= (better.reach or 0)
            and self.loss_percent >= better.loss_percent
            and self.step_s >= better.step_s
        )


def _has_unknown(costs: Sequence[Cost]) -> bool:
    return any(cost.percent is None for cost in costs)


def rank(found: Candidate) -> tuple[float, ...]:
    """The asked hardware, then what can be trusted, then the farthest, or without a reach the
    fastest, then the least known loss, the fastest, the simplest."""
    goal = found.step_s if found.reach is None else -found.reach
    trusted = (found.hardware, found.feared_percent)
    return (*trusted, goal, found.loss_percent, found.step_s, len(found.changes))


def expense(found: Candidate) -> tuple[float, ...]:
    """The asked hardware, then the fewest devices, what ullage runs today, what can be trusted, and
    the least known loss, the fastest, the simplest."""
    execution = found.recipe.execution
    devices = execution.tensor_parallel * execution.pipeline_parallel
    price = (found.hardware, devices, not found.runs, found.feared_percent, found.loss_percent)
    return (*price, found.step_s, len(found.changes))


def front_of(every: list[Candidate]) -> tuple[Candidate, ...]:
    """What is not beaten, nor equalled, in all three; of equals the one with the fewest changes."""
    front: list[Candidate] = []
    best: list[tuple[float, float]] = []
    order = sorted(
        every, key=lambda found: (found.peak_bytes, found.loss_percent, found.step_s, found.changes)
    )
    for found in order:
        mine = (found.loss_percent, found.step_s)
        if not any(loss <= mine[0] and step_s <= mine[1] for loss, step_s in best):
            front.append(found)
            best.append(mine)
    return tuple(front)
