"""Candidates: their costs together, and which goes before which."""

from dataclasses import replace

import pytest

from ullage import Recipe, Workload, default_execution, find_device, resolve
from ullage.planner.candidates import Candidate, expense
from ullage.planner.costs import FREE, Cost
from ullage.planner.explore import Exploration
from ullage.specs.latency import Band, Latency
from ullage.specs.quality import Quality

CARD = find_device("rtx-4090")
RECIPE = Recipe(
    resolve("llama-3.1-8b"), CARD, Workload(9000, 96, 20), default_execution(CARD, "ullage")
)
BITS = Quality("weights", "x", "m", 10, "perplexity %", 1.5, 8, "measured", "a run of ours")


def candidate(*changes: str, reach: int = 100, loss: float = 0.0, step_s: float = 1.0) -> Candidate:
    latency = Latency(0.0, 1 / step_s, 1 / step_s, Band(0, 0), Band(0, 0))
    figures = (Cost(replace(BITS, change=loss)), *[FREE] * (len(changes) - 1))
    return Candidate(RECIPE, 10, 5, latency, changes, figures, figures[:1], True, False, reach)


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (candidate("a", "b"), False),  # all of the better one's changes and more, for nothing
        (candidate("a", "b", reach=101), True),
        (candidate("a", "b", loss=-1.0), False),  # a gain is noise
        (candidate("a", "b", step_s=0.5), True),
        (candidate("b"), True),  # another way
    ],
)
def test_the_best_leave_out_what_only_adds_changes(other: Candidate, kept: bool) -> None:
    first = candidate("a")
    explored = Exploration("context", (first, other), (first, other), ())
    assert explored.best(10) == ([first, other] if kept else [first])
    assert explored.best(1) == [first]


def test_a_sum_of_costs_is_known_where_each_of_them_is() -> None:
    both = replace(candidate("a"), costs=(Cost(BITS), Cost(replace(BITS, change=0.25))))
    assert both.cost_percent == 1.75
    some = replace(both, costs=(Cost(BITS), Cost()))
    assert (some.cost_percent, some.known_percent) == (None, 1.5)
    assert replace(both, costs=()).cost_percent == 0


def test_what_can_be_run_goes_before_less_loss_and_the_hardware_last() -> None:
    runs, planned = candidate("a", loss=2), replace(candidate("b", loss=1), runs=False)
    other = replace(candidate("c"), hardware=True)
    unknown = replace(candidate("d"), costs=(Cost(),), change_costs=(Cost(),))
    faster, simpler = candidate("e", "f", loss=2, step_s=0.5), candidate("g", "h", loss=2)
    found = [other, planned, unknown, simpler, runs, faster]
    assert sorted(found, key=expense) == [faster, runs, simpler, unknown, planned, other]
