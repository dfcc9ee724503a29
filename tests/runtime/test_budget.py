"""The budget: nobody gets more than is free, and a refusal changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import Device, Execution, Plan, Recipe, Workload, build_plan, resolve
from ullage.errors import BudgetExceeded, DoesNotFit
from ullage.runtime.budget import Budget, refuse_crowded, refuse_misfit
from ullage.units import GIB

claims = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1000)), max_size=20)


@given(st.integers(0, 3000), claims)
def test_the_limit_is_never_passed(limit_bytes: int, wanted: list[tuple[str, int]]) -> None:
    budget, granted = Budget(limit_bytes), 0
    for holder, size_bytes in wanted:
        held_before = dict(budget.held_bytes)
        if granted + size_bytes <= limit_bytes:
            budget.claim(holder, size_bytes)
            granted += size_bytes
        else:
            with pytest.raises(BudgetExceeded):
                budget.claim(holder, size_bytes)
            assert budget.held_bytes == held_before
        assert budget.free_bytes == limit_bytes - granted >= 0
    assert sum(budget.held_bytes.values()) == granted


def test_a_holder_adds_to_what_it_has() -> None:
    budget = Budget(100)
    budget.claim("weights", 60)
    budget.claim("KV pool", 10)
    budget.claim("weights", 30)
    assert budget.held_bytes == {"weights": 90, "KV pool": 10}
    assert budget.free_bytes == 0


def test_a_refusal_says_who_holds_what() -> None:
    budget = Budget(100 << 20)
    budget.claim("weights", 90 << 20)
    with pytest.raises(BudgetExceeded) as refused:
        budget.claim("KV pool", 20 << 20)
    message = str(refused.value)
    for part in ("KV pool needs 20.0 MiB", "10.0 MiB", "100.0 MiB", "weights 90.0 MiB", "--memory"):
        assert part in message
    assert refused.value.exit_code == 1


def plan_in(budget_bytes: int | None = None, dtype: str = "fp32") -> Plan:
    """Of a model whose load peaks highest in bf16, its prefill in fp32."""
    execution = Execution(dtype=dtype, kv_dtype=dtype)
    device = Device("cpu", "cpu", 64 * GIB)
    recipe = Recipe(resolve("smollm2-135m"), device, Workload(100, 10), execution)
    return build_plan(recipe, budget_bytes)


def test_a_plan_is_refused_by_its_own_figures() -> None:
    peak_bytes = plan_in().peak_bytes
    refuse_misfit(plan_in(peak_bytes))
    with pytest.raises(DoesNotFit) as refused:
        refuse_misfit(plan_in(peak_bytes - 1))
    assert refused.value.needed_bytes == peak_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_is_refused_where_the_runtime_holds_more_than_planned(dtype: str) -> None:
    plan = plan_in(plan_in(dtype=dtype).peak_bytes, dtype)
    runtime_bytes = plan.phases["load"].overhead_bytes
    refuse_crowded(plan, runtime_bytes - 1)
    refuse_crowded(plan, runtime_bytes)
    with pytest.raises(BudgetExceeded, match=r"phase needs .*\(runtime"):
        refuse_crowded(plan, runtime_bytes + 1)
