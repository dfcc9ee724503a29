"""Facts that last: a ledger of what was written, edited, forgotten and rolled back. No torch.

Events are only ever added; the facts that stand are a view of them. So a ledger is what it was at
any event or time, and whatever a model makes of facts can be made again, and held to their hashes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ullage.errors import FactError
from ullage.techniques.larimar.database import transaction
from ullage.techniques.larimar.event import Action, Event
from ullage.techniques.larimar.fact import Fact, plain
from ullage.techniques.larimar.history import History, Moment

_HOLDERS = ", ".join("?" * len(Event.__annotations__))


@dataclass(frozen=True)
class Who:
    """Who changes a ledger, and why, each in one line.

    Raises:
        FactError: either is no text.
    """

    actor: str
    reason: str = ""

    def __post_init__(self) -> None:
        for name in ("actor", "reason"):
            object.__setattr__(self, name, plain(getattr(self, name)))


@dataclass(frozen=True)
class Added:
    """The number of each fact that was to be written, how many of them did not stand yet, and what
    stood by each number then."""

    numbers: list[int]
    new: int
    facts: dict[int, Fact]


class Ledger(History):
    """A ledger that is written to.

    Each method that changes it is one transaction: when it returns, what it did is on disk, all of
    it, and if it raises, or the process is killed, nothing is. Each raises a LedgerError where the
    last event is not as it was written; `verify` goes through all of them.
    """

    _last: Event | None = None  # in a transaction, the last so far

    def add(self, facts: Iterable[Fact], who: Who) -> Added:
        """Write facts. One that stands already, in its answer, is not written again.

        Raises:
            FactError: one contradicts a fact that stands, or one before it: none is written.
        """
        numbers, new, stood = [], 0, dict[int, Fact]()
        with self._writing():
            first = self._next_number
            for fact in facts:
                standing = self._standing(fact)
                if standing is None:
                    standing, new = self._next_number, new + 1
                    self._append("add", who, standing, None, fact)
                    stood[standing] = fact
                else:
                    stood[standing] = self.fact(standing)
                    if not fact.says(stood[standing]):
                        raise FactError(self._contradiction(fact, standing, first))
                numbers.append(standing)
        return Added(numbers, new, stood)

    def edit(self, number: int, fact: Fact, who: Who, was: Fact | None = None) -> Event | None:
        """Put `fact` in the place of fact `number`, where that still is what it `was` when the edit
        was made up; None if it is the same.

        Raises:
            FactError: no such fact stands, or another one by now, or another says this already or
                contradicts it.
        """
        with self._writing():
            before = self.fact(number)
            if was is not None and before != was:
                self.verify()  # it may be that nobody edited it
                raise FactError(f"Fact {number} was edited meanwhile: look at it and try again.")
            if before == fact:
                return None
            other = self._standing(fact)
            if other is not None and other != number:
                if fact.says(self.fact(other)):
                    raise FactError(f"Fact {other} says that already.")
                raise FactError(self._contradiction(fact, other, self._next_number))
            return self._append("edit", who, number, before, fact)

    def forget(self, numbers: Iterable[int], who: Who) -> list[Event]:
        """
        Raises:
            FactError: no such fact stands; none is forgotten then.
        """
        with self._writing():
            return [
                self._append("forget", who, number, self.fact(number), None)
                for number in dict.fromkeys(numbers)
            ]

    def rollback(self, to: Moment, who: Who) -> list[Event]:
        """Let the facts stand that stood at `to`: an event for each that differs.

        Raises:
            LedgerError: there was no such event.
        """
        with self._writing():
            now, then = self.facts(), self.facts(to)
            return [
                self._append("rollback", who, number, now.get(number), then.get(number))
                for number in sorted(now.keys() | then.keys())
                if now.get(number) != then.get(number)
            ]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with transaction(self._connection, self.path):
            self._last = self._sound_head()
            yield

    @property
    def _next_number(self) -> int:
        return 1 if self._last is None else self._last.number + 1

    def _append(
        self, action: Action, who: Who, number: int, before: Fact | None, after: Fact | None
    ) -> Event:
        event = Event.following(
            self._last, action=action, actor=who.actor, reason=who.reason, fact=number,
            before=None if before is None else before.content,
            after=None if after is None else after.content,
            asks=None if after is None else after.asks,
        )  # fmt: skip
        values = tuple(event.record.values())
        self._connection.execute(f"INSERT INTO events VALUES ({_HOLDERS})", values)
        self._last = event
        return event

    def _standing(self, fact: Fact) -> int | None:
        """The number of the fact that stands and asks the same."""
        found = self._one("SELECT fact FROM facts WHERE asks = ?", fact.asks)
        return None if found is None else int(found[0])

    def _contradiction(self, fact: Fact, number: int, first: int) -> str:
        """`first`: the number that the first of those that are written together has."""
        said = self.fact(number).text
        if number >= first:
            return f'"{fact.text}" contradicts another that is to be written, "{said}".'
        return (
            f'"{fact.text}" contradicts fact {number}, "{said}": edit that one, or forget it first.'
        )
