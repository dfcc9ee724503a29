"""Budget: a hard limit in bytes, and who holds how much of it. Asked before allocating."""

from ullage.errors import BudgetExceeded, DoesNotFit
from ullage.specs.plan import Plan
from ullage.units import MIB, format_bytes


class Budget:
    """`limit_bytes`, shared out among named holders. Whoever would pass it is refused."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes: dict[str, int] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody holds; below zero when more was measured than the limit."""
        return self.limit_bytes - sum(self.held_bytes.values())

    def claim(self, holder: str, size_bytes: int) -> None:
        """Give `holder` room for `size_bytes`, on top of what it has.

        Raises:
            BudgetExceeded: less is free; nothing changes.
        """
        if size_bytes > self.free_bytes:
            raise BudgetExceeded(
                f"{holder} needs {format_bytes(size_bytes)}; {format_bytes(self.free_bytes)} of "
                f"the {format_bytes(self.limit_bytes)} budget is free ({self._shares()}). "
                "Run `ullage audit` to measure this machine, or give a larger --memory."
            )
        self.held_bytes[holder] = self.held_bytes.get(holder, 0) + size_bytes

    def _shares(self) -> str:
        return ", ".join(f"{name} {format_bytes(held)}" for name, held in self.held_bytes.items())


def refuse_misfit(plan: Plan) -> None:
    """Refuse a plan by its own figures.

    Raises:
        DoesNotFit: its peak is above its budget.
    """
    if not plan.fits:
        smallest = f"--memory {-(-plan.peak_bytes // MIB)}MiB"
        raise DoesNotFit(
            f"The plan needs {format_bytes(plan.peak_bytes)}, more than its budget of "
            f"{format_bytes(plan.budget_bytes)}: {smallest} is enough.",
            needed_bytes=plan.peak_bytes,
        )


def refuse_crowded(plan: Plan, held_bytes: int) -> None:
    """Refuse a plan for which a process that holds `held_bytes` before any weight is read, more
    than was planned for the runtime, has no room.

    Raises:
        BudgetExceeded: a phase would pass the budget.
    """
    for name, phase in plan.phases.items():
        budget = Budget(plan.budget_bytes)
        budget.claim("runtime", held_bytes)
        budget.claim(f"The {name} phase", phase.total_bytes - phase.overhead_bytes)
