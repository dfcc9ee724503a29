"""The rows of a memory: a key and a value for each fact, in fp64, on CPU."""

import torch

from ullage.errors import TechniqueError

_ROOM = 64  # rows that there is room for before any is written


class Rows:
    """Rows by the number of their fact. To add one and to take one away cost the same however many
    there are: room doubles when it runs out, and the last row moves to where one was taken."""

    def __init__(self) -> None:
        self.facts: list[int] = []  # of each row
        self._place: dict[int, int] = {}  # the other way round
        self._keys = torch.empty(0, 0, dtype=torch.float64)
        self._values = torch.empty(0, 0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.facts)

    def __contains__(self, fact: int) -> bool:
        return fact in self._place

    @property
    def keys(self) -> torch.Tensor:
        """[N, C], a view."""
        return self._keys[: len(self)]

    @property
    def values(self) -> torch.Tensor:
        """[N, V], a view."""
        return self._values[: len(self)]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, and of those that there is room for."""
        return self._keys.nbytes + self._values.nbytes

    def refuse(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """
        Raises:
            TechniqueError: [C] and [V] that are no row of these.
        """
        for row in (key, value):
            if row.ndim != 1 or not torch.isfinite(row).all():
                raise TechniqueError("larimar: a key or a value is one row of finite numbers.")
        if not key.any():
            raise TechniqueError("larimar: a key of zeros cannot be told from any other.")
        given, held = (len(key), len(value)), (self._keys.shape[1], self._values.shape[1])
        if self.facts and given != held:
            raise TechniqueError(
                f"larimar: a key of {given[0]} numbers and a value of {given[1]} do not go into a "
                f"memory of {held[0]} and {held[1]}."
            )

    def add(self, fact: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """A row [C] and [V] for a fact that has none."""
        at = len(self)
        if at == len(self._keys) or not at:
            self._keys = _with_room(self.keys, len(key))
            self._values = _with_room(self.values, len(value))
        self._keys[at], self._values[at] = key, value
        self.facts.append(fact)
        self._place[fact] = at

    def take(self, fact: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the row of a fact; returns its key and value. Nothing of it is left here."""
        at, last = self._place.pop(fact), len(self) - 1
        key, value = self._keys[at].clone(), self._values[at].clone()
        moved = self.facts.pop()
        if at != last:
            self._keys[at], self._values[at] = self._keys[last], self._values[last]
            self.facts[at], self._place[moved] = moved, at
        self._keys[last], self._values[last] = 0, 0
        return key, value


def _with_room(rows: torch.Tensor, width: int) -> torch.Tensor:
    grown = torch.zeros(max(_ROOM, 2 * len(rows)), width, dtype=torch.float64)
    if len(rows):
        grown[: len(rows)] = rows
    return grown
