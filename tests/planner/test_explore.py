"""The search over all levers: what it returns fits, is ranked as it says, always the same."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage import Recipe, TechniqueChoice, default_execution, find_device, resolve
from ullage.errors import DoesNotFit
from ullage.planner.candidates import Candidate
from ullage.planner.engines import ENGINES
from ullage.planner.explore import Exploration, cheapest_change, explore
from ullage.planner.levers import levers_of
from ullage.planner.memory import peak_bytes
from ullage.planner.search import Freedom
from ullage.specs.calibration import Calibration
from ullage.specs.device import Device
from ullage.specs.workload import Workload
from ullage.units import GIB

CARD = find_device("rtx-4090")
FIXED = Freedom(False, False, False, False, False, False)
FREE = Freedom()
goals = st.sampled_from(["context", "concurrency", "latency"])


def recipe(
    model: str = "llama-3.1-8b", tokens: int = 8000, sequences: int = 1, device: Device = CARD
) -> Recipe:
    work = Workload(tokens, 192, sequences)
    return Recipe(resolve(model), device, work, default_execution(device))


def costs(found: Candidate) -> float:
    return float("inf") if found.cost_percent is None else found.cost_percent


@given(
    st.sampled_from(["smollm2-135m", "llama-3.1-8b", "gemma-2-9b", "gpt2"]),
    st.integers(1, 20_000),
    st.integers(1, 40),
    st.integers(1, 40),
    goals,
)
@settings(max_examples=25)
def test_what_is_ranked_fits_and_reaches_as_far_as_it_says(
    model: str, tokens: int, sequences: int, budget_gib: int, goal: Any
) -> None:
    budget_bytes = budget_gib * GIB
    explored = explore(recipe(model, tokens, sequences), budget_bytes, goal, FREE)
    for found in explored.ranked:
        assert peak_bytes(found.recipe) == found.peak_bytes <= budget_bytes
    for found in explored.ranked[:3]:
        assert_edge(found, goal)


def assert_edge(found: Candidate, goal: str) -> None:
    """One size more than it reaches fails, or is more than the model has."""
    work, model = found.recipe.workload, found.recipe.model
    if goal == "latency":
        assert found.reach is None
        return
    assert found.reach is not None
    if goal == "context":
        most = max(work.context_tokens, model.max_context_tokens)
        sizes = [replace(work, prompt_tokens=found.reach - work.output_tokens + n) for n in (0, 1)]
    else:
        most = 1 << 16
        sizes = [replace(work, sequences=found.reach + n) for n in (0, 1)]
    last, next_one = (peak_bytes(replace(found.recipe, workload=size)) for size in sizes)
    assert last <= found.budget_bytes
    assert found.reach == most or next_one > found.budget_bytes


def tokens_per_s(found: Candidate) -> float:
    """Of the asked request, from end to end."""
    latency, work = found.latency, found.recipe.workload
    assert latency is not None
    whole_s = latency.ttft_s + work.output_tokens / latency.sequence_tokens_per_s
    return work.output_tokens / whole_s


def doubt(found: Candidate) -> float:
    """By what the docs say: known small losses first, else the feared loss, unknown ones as 5%."""
    losses = [cost.percent for cost in found.change_costs]
    feared = sum(5 if loss is None else loss for loss in losses)
    return 0 if feared <= 5 and None not in losses else feared


@given(st.integers(6, 30), goals)
@settings(max_examples=10)
def test_the_ranking_is_by_trust_then_goal_then_loss(budget_gib: int, goal: Any) -> None:
    ranked = explore(recipe(), budget_gib * GIB, goal, FREE).ranked
    keys = [
        (doubt(found), -tokens_per_s(found) if found.reach is None else -found.reach, costs(found))
        for found in ranked
    ]
    assert keys == sorted(keys)


def on_llamacpp(model: str, device: Device = CARD) -> Recipe:
    execution = default_execution(device, "llama.cpp")
    return Recipe(resolve(model), device, Workload(30_000, 192), execution)


@pytest.mark.parametrize("goal", ["context", "concurrency", "latency"])
def test_what_loses_much_or_nobody_knows_does_not_lead(goal: Any) -> None:
    """Two-bit weights are the fastest and the smallest, and lose 39% of an 8B's perplexity."""
    explored = explore(on_llamacpp("llama-3.1-8b"), None, goal, FREE)
    best = explored.ranked[0]
    assert best.cost_percent is not None
    assert best.cost_percent <= 5
    assert any(found.cost_percent is None for found in explored.every)


def test_what_loses_much_leads_where_nothing_else_fits_and_then_the_least_first() -> None:
    """Room for three-bit weights, not for four: the largest lose 7%, the smallest 834%."""
    freedom = replace(FREE, kv_dtype=False)
    explored = explore(on_llamacpp("llama-3.1-8b"), 8 * GIB, "latency", freedom)
    losses = [found.cost_percent for found in explored.ranked if found.cost_percent is not None]
    assert losses[0] == pytest.approx(7.05)
    assert losses[-1] == pytest.approx(834.24)
    assert losses == sorted(losses)


def test_a_known_loss_goes_before_the_same_and_an_unknown_one() -> None:
    """A 70B on 24 GiB: with the same weights, KV entries in q8_0 before those in q4_0."""
    ranked = explore(on_llamacpp("llama-3.3-70b"), None, "latency", FREE).ranked
    kinds = [found.changes[1] for found in ranked if found.changes[0] == "--weights iq2_xxs"]
    assert kinds.index("--kv-cache-dtype q8_0") < kinds.index("--kv-cache-dtype q4_0")


def test_what_was_asked_is_not_held_against_it() -> None:
    """Two-bit weights, fixed, leave the choice of KV entries as it was, with their loss said."""
    asked = on_llamacpp("llama-3.1-8b")
    asked = ENGINES["llama.cpp"].with_weights(asked, "q2_k")
    best = explore(asked, None, "latency", replace(FREE, weights=False)).ranked[0]
    assert best.changes == ("--kv-cache-dtype q8_0",)
    assert best.cost_percent == pytest.approx(38.82 + 0.03)


def test_it_is_always_the_same() -> None:
    first, second = (explore(recipe(), None, "context", FREE) for _ in range(2))
    assert first == second


def test_what_was_asked_is_the_first_of_all() -> None:
    asked = recipe()
    explored = explore(asked, None, "latency", FREE)
    assert explored.every[0].recipe == asked
    assert explored.every[0].changes == ()
    assert len(explored.every) == len({found.changes for found in explored.every})


def test_nothing_moves_that_the_user_fixed() -> None:
    assert len(explore(recipe(), None, "context", FIXED).every) == 1


def test_unknown_costs_rank_after_small_ones() -> None:
    ranked = explore(recipe(), None, "context", FREE).ranked
    known = [found.cost_percent is not None for found in ranked if found.known_percent <= 5]
    assert known == sorted(known, reverse=True)
    assert not all(known)


def test_the_front_is_shown_without_what_nobody_would_take() -> None:
    """One and two bits are on the front too, for their memory."""
    explored = explore(on_llamacpp("llama-3.1-8b"), None, "latency", FREE)
    shown = explored.shown_front(10)
    assert len(shown) == 10 < len(explored.front)
    assert [found.peak_bytes for found in shown] == sorted(found.peak_bytes for found in shown)
    assert all(found in explored.front and found.fits for found in shown)
    assert max(costs(found) for found in shown) <= 5 < max(costs(found) for found in explored.front)
    assert explored.shown_front(1000) == [found for found in explored.front if found.fits]


def dominated(found: Candidate, other: Candidate) -> bool:
    assert found.latency is not None
    assert other.latency is not None
    return (
        other.peak_bytes < found.peak_bytes
        and costs(other) <= costs(found)
        and other.latency.tokens_per_s >= found.latency.tokens_per_s
        and other.latency.ttft_s <= found.latency.ttft_s
    )


def test_nothing_beats_the_front() -> None:
    explored = explore(recipe(), None, "latency", FREE)
    for found in explored.front:
        assert not any(dominated(found, other) for other in explored.every)
    peaks = [found.peak_bytes for found in explored.front]
    assert peaks == sorted(peaks)


def test_the_best_leaves_out_what_only_adds_changes() -> None:
    best = explore(recipe(), None, "latency", FREE).best(10)
    assert best[0].changes == ("--weights nf4",) or best[0].changes == ()
    for place, found in enumerate(best):
        for better in best[:place]:
            same = costs(found) == costs(better) and found.latency == better.latency
            assert not (same and set(found.changes) > set(better.changes))


def change(asked: Recipe, budget_bytes: int | None = None, *devices: Device) -> Candidate:
    return cheapest_change(asked, budget_bytes, FREE, devices)


def test_the_cheapest_change_is_one_and_fits() -> None:
    asked = recipe(tokens=100_000)
    assert peak_bytes(asked) > CARD.memory_bytes
    found = change(asked)
    assert found.changes == ("--kv-cache-dtype int8",)
    assert peak_bytes(found.recipe) <= CARD.memory_bytes


def test_no_loss_goes_before_any() -> None:
    """A smaller chunk is enough where activations are what does not fit."""
    asked = recipe(tokens=20_000)
    whole = replace(asked, execution=replace(asked.execution, prefill_chunk=0))
    chunked = peak_bytes(asked)
    assert change(whole, chunked + 20 * (1 << 20)).changes[0].startswith("--prefill-chunk")


def test_another_device_is_the_last_resort() -> None:
    large = find_device("h100")
    assert change(recipe(tokens=100_000), None, large).changes == ("--kv-cache-dtype int8",)
    fixed = cheapest_change(recipe(tokens=100_000), None, FIXED, (large,))
    assert fixed.changes == ("--device h100-80gb",)
    assert fixed.hardware


def test_where_no_single_change_is_enough_several_are() -> None:
    found = change(recipe("llama-2-13b", 4000, 16, find_device("rtx-3090")))
    assert len(found.changes) > 1
    assert found.runs


def test_where_nothing_fits_the_smallest_budget_is_named() -> None:
    with pytest.raises(DoesNotFit) as refused:
        change(recipe("llama-3.1-70b"))
    needed_bytes = refused.value.needed_bytes
    assert change(recipe("llama-3.1-70b"), needed_bytes).peak_bytes == needed_bytes


def test_a_calibration_counts_on_its_own_device_alone() -> None:
    large, heavy = find_device("h100"), 5 * GIB
    measured = Calibration(CARD.name, "ullage", {"runtime_bytes": heavy}, {})
    plain, known = (
        explore(recipe(), None, "context", FIXED, (large,), calibration).every
        for calibration in (None, measured)
    )
    assert known[0].peak_bytes > plain[0].peak_bytes + 4 * GIB
    assert known[1].peak_bytes == plain[1].peak_bytes


@pytest.mark.parametrize("engine", ["ullage", "transformers"])
def test_the_levers_are_the_engines(engine: Any) -> None:
    asked = replace(recipe(), execution=default_execution(CARD, engine))
    levers = {lever.name: [place.typed for place in lever.settings] for lever in
              levers_of(asked, FREE)}  # fmt: skip
    assert levers["weights"] == ["", "--weights int8", "--weights nf4"]
    assert ("--technique dms:kept=0.125" in levers["sparsity"]) == (engine == "ullage")
    assert levers["tensor parallel"] == [""]
    int8 = ["--kv-cache-dtype int8"] if engine == "ullage" else []
    assert levers["KV entries"] == ["", *int8]


def test_fp32_has_narrower_formats() -> None:
    cpu = find_device("cpu-16gb")
    levers = {lever.name: lever for lever in levers_of(recipe(device=cpu), FREE)}
    assert [place.typed for place in levers["KV entries"].settings] == [
        "", "--kv-cache-dtype bf16", "--kv-cache-dtype int8",
    ]  # fmt: skip
    assert "--weights bf16" in [place.typed for place in levers["weights"].settings]


def test_what_is_quantized_already_keeps_its_weights() -> None:
    asked = replace(recipe(), techniques=(TechniqueChoice("quantization", {"scheme": "int8"}),))
    (weights,) = [lever for lever in levers_of(asked, FREE) if lever.name == "weights"]
    assert len(weights.settings) == 1
    assert weights.settings[0].cost.percent == 0.19


def test_an_eager_request_can_leave_it() -> None:
    asked = recipe(tokens=30_000)
    eager = replace(default_execution(CARD, "transformers"), attention="eager")
    found = change(replace(asked, execution=eager))
    assert found.changes == ("--attention sdpa",)


def test_the_sum_of_costs_needs_each_of_them() -> None:
    explored: Exploration = explore(recipe(), None, "latency", FREE)
    for found in explored.every:
        known = [cost.percent for cost in found.costs]
        if None in known:
            assert found.cost_percent is None
        else:
            assert found.cost_percent == pytest.approx(sum(known))  # type: ignore[arg-type]


SEARCH = """
import sys
from ullage import Recipe, Workload, default_execution, find_device, resolve
from ullage.planner.explore import explore
from ullage.planner.search import Freedom
from ullage.specs.device import catalog

card = find_device("rtx-4090")
recipe = Recipe(resolve("llama-3.1-8b"), card, Workload(8000, 192), default_execution(card))
explored = explore(recipe, None, "context", Freedom(), list(catalog().values()))
assert len(explored.every) > 4500
assert "torch" not in sys.modules
"""


def test_five_thousand_combinations_are_searched_without_torch() -> None:
    """How long that takes, benchmarks/search_speed.py says."""
    subprocess.run([sys.executable, "-c", SEARCH], check=True)
