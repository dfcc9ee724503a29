"""The budget: nobody gets more than is free, and a refusal changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import BudgetExceeded
from ullage.runtime.budget import Budget

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
