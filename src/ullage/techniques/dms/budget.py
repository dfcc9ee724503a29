"""How much a budget lets DMS keep. No torch."""

from bisect import bisect_right
from collections.abc import Callable

KEPT_STEPS = 10_000  # of a share; one of 128K tokens is under a block
LEAST_KEPT = 1 / KEPT_STEPS


def most_kept(held_bytes: Callable[[float], int], budget_bytes: int) -> float | None:
    """The largest share whose `held_bytes` are inside the budget, None where there is none."""
    # all entries take the fewer blocks than nearly all: windows and survivors have some each
    if held_bytes(1.0) <= budget_bytes:
        return 1.0

    def step_bytes(step: int) -> int:
        return held_bytes(step / KEPT_STEPS)

    step = bisect_right(range(1, KEPT_STEPS), budget_bytes, key=step_bytes)
    while step and step_bytes(step) > budget_bytes:  # heads that share are not wholly in order
        step -= 1
    return step / KEPT_STEPS if step else None
