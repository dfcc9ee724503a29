"""Budget: a hard limit in bytes, and who holds how much of it. Asked before allocating."""

from ullage.errors import BudgetExceeded
from ullage.units import format_bytes


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
