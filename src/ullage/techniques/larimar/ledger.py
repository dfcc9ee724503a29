"""Facts that last: a ledger of what was written, edited, forgotten and rolled back. No torch.

Events are only ever added; the facts that stand are a view of them. So a ledger is what it was at
any event or time, and whatever a model makes of facts can be made again, and held to their hashes.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ullage.errors import FactError, LedgerError
from ullage.techniques.larimar.database import (
    connect,
    in_memory,
    is_stale,
    our_errors,
    transaction,
)
from ullage.techniques.larimar.event import START, Action, Event, stamp
from ullage.techniques.larimar.fact import Fact, plain

_COLUMNS = ", ".join(Event.__annotations__)
_HOLDERS = ", ".join("?" * len(Event.__annotations__))
_STANDING = """SELECT fact, after FROM events WHERE after IS NOT NULL AND number IN
    (SELECT max(number) FROM events WHERE number <= ? AND fact IS NOT NULL GROUP BY fact)
    ORDER BY fact"""

Moment = int | datetime  # an event's number, or a time


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


class Ledger:
    """A ledger in the file `path`; use it as a context manager, in one thread.

    Each method that changes it is one transaction: when it returns, what it did is on disk, all of
    it, and if it raises, or the process is killed, nothing is. Each raises a LedgerError where the
    last event is not as it was written; `verify` goes through all of them.
    """

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False) -> None:
        """`create` begins one without events where there is none, whatever is written then.

        Raises:
            LedgerError: as `database.connect`.
        """
        self.path = path
        self._connection = connect(path, create, read_only)
        self._last: Event | None = None  # in a transaction, the last so far

    @classmethod
    def in_memory(cls) -> Self:
        """One that ends with this process, in no file."""
        ledger = cls.__new__(cls)
        ledger.path, ledger._connection, ledger._last = Path("this ledger"), in_memory(), None
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._connection.close()

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

    def bind(self, model: str, fingerprint: str, who: Who) -> None:
        """Say of which model the ledger is, once; what it may be used with from then on.

        Raises:
            LedgerError: it is another's.
        """
        with self._writing():
            bound = self.model
            if bound is None:
                content = json.dumps({"model": model, "fingerprint": fingerprint})
                self._record("bind", who, after=content)
            elif bound[1] != fingerprint:
                raise LedgerError(
                    f"{self.path} holds facts for {bound[0]}, not for this model, {model}: export "
                    "them and add them to a ledger of its own."
                )

    @property
    def model(self) -> tuple[str, str] | None:
        """Name and fingerprint of the model that it is bound to."""
        found = self._one("SELECT after FROM events WHERE fact IS NULL LIMIT 1")
        if found is None:
            return None
        said = json.loads(found[0])
        return said["model"], said["fingerprint"]

    @property
    def head(self) -> Event | None:
        """The last event. Its `chain_hash` is of all that ever happened."""
        found = self._one(f"SELECT {_COLUMNS} FROM events ORDER BY number DESC LIMIT 1")
        return None if found is None else Event(*found)

    def fact(self, number: int) -> Fact:
        """
        Raises:
            FactError: no such fact stands.
        """
        found = self._one("SELECT after FROM facts WHERE fact = ?", number)
        if found is not None:
            return Fact.from_json(found[0])
        was = self._one("SELECT max(number) FROM events WHERE fact = ?", number)
        if was is None or was[0] is None:
            raise FactError(f"{self.path} has no fact {number}.")
        raise FactError(f"Fact {number} does not stand: event {was[0]} took it away.")

    def facts(self, as_of: Moment | None = None) -> dict[int, Fact]:
        """The facts that stand, or stood at `as_of`, by number.

        Raises:
            LedgerError: there was no such event.
        """
        if as_of is None:
            rows = self._all("SELECT fact, after FROM facts ORDER BY fact")
        else:
            rows = self._all(_STANDING, self.number_at(as_of))
        return {number: Fact.from_json(content) for number, content in rows}

    def events(
        self, fact: int | None = None, as_of: Moment | None = None, after: int = 0
    ) -> Iterator[Event]:
        """All events in their order, or those of one fact, up to `as_of`; those behind number
        `after`."""
        last = self.number_at(as_of) if as_of is not None else 1 << 62
        only, of = ("", ()) if fact is None else ("AND fact = ?", (fact,))
        between = "number > ? AND number <= ?"
        query = f"SELECT {_COLUMNS} FROM events WHERE {between} {only} ORDER BY number"
        return (Event(*row) for row in self._all(query, after, last, *of))

    def number_at(self, moment: Moment) -> int:
        """The number of the last event at `moment`; 0 before the first.

        Raises:
            LedgerError: there is no such event yet.
        """
        head = self.head
        last = 0 if head is None else head.number
        if isinstance(moment, int):
            if not 0 <= moment <= last:
                raise LedgerError(f"{self.path} has no event {moment}: its last is {last}.")
            return moment
        found = self._one("SELECT max(number) FROM events WHERE time <= ?", stamp(moment))
        return int((found and found[0]) or 0)

    def verify(self) -> None:
        """Go through all events: hashes, numbers, and what each found before it.

        Raises:
            LedgerError: one was changed, taken out or put in after it was written; says which.
        """
        chain, standing = START, dict[int | None, str]()
        for event in self.events():
            self.refuse_changed(event, chain)
            if event.fact is not None and event.before != standing.get(event.fact):
                raise self._tampered(event)
            chain = event.chain_hash
            standing.pop(event.fact, None)
            if event.after is not None:
                standing[event.fact] = event.after

    def refuse_changed(self, event: Event, before: str) -> None:
        """
        Raises:
            LedgerError: `event` is not as it was written behind one of the chain hash `before`.
        """
        if not event.follows(before):
            raise self._tampered(event)

    def _tampered(self, event: Event) -> LedgerError:
        return LedgerError(
            f"{self.path} was tampered with: event {event.number} is not as it was written."
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with transaction(self._connection, self.path):
            self._last = self._sound_head()
            yield

    def _sound_head(self) -> Event | None:
        """The last event, which others are chained to: it has to follow the one before it."""
        rows = self._all(f"SELECT {_COLUMNS} FROM events ORDER BY number DESC LIMIT 2")
        events = [Event(*row) for row in rows]
        if events:
            self.refuse_changed(events[0], events[1].chain_hash if events[1:] else START)
        return events[0] if events else None

    @property
    def _next_number(self) -> int:
        return 1 if self._last is None else self._last.number + 1

    def _append(
        self, action: Action, who: Who, number: int, before: Fact | None, after: Fact | None
    ) -> Event:
        return self._record(
            action,
            who,
            fact=number,
            before=None if before is None else before.content,
            after=None if after is None else after.content,
            asks=None if after is None else after.asks,
        )

    def _record(self, action: Action, who: Who, **what: Any) -> Event:
        none = {"fact": None, "before": None, "after": None, "asks": None}
        event = Event.following(
            self._last, action=action, actor=who.actor, reason=who.reason, **none | what
        )
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

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        return next(iter(self._all(query, *values)), None)

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        if is_stale(self._connection, self.path):
            self._connection.close()
            self._connection = connect(self.path, read_only=True)
        with our_errors(self.path):
            return self._connection.execute(query, values).fetchall()
