"""What a ledger of facts holds, read: its events, and the facts that stand after them. No torch."""

import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ullage.errors import FactError, LedgerError
from ullage.techniques.larimar.database import connect, in_memory, is_stale, our_errors
from ullage.techniques.larimar.event import START, Event, stamp
from ullage.techniques.larimar.fact import Fact

_COLUMNS = ", ".join(Event.__annotations__)
_STANDING = """SELECT fact, number, after FROM events WHERE after IS NOT NULL AND number IN
    (SELECT max(number) FROM events WHERE number BETWEEN 1 AND ? AND fact IS NOT NULL GROUP BY fact)
    ORDER BY fact"""

Moment = int | datetime  # an event's number, or a time


class History:
    """The ledger in the file `path`; use it as a context manager, in one thread."""

    _in_file = True

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False) -> None:
        """`create` begins one without events where there is none, whatever is written then.

        Raises:
            LedgerError: as `database.connect`.
        """
        self.path = path
        self._connection = connect(path, create, read_only)

    @classmethod
    def in_memory(cls) -> Self:
        """One that ends with this process, in no file."""
        ledger = cls.__new__(cls)
        ledger.path, ledger._connection = Path("this ledger"), in_memory()
        ledger._in_file = False
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

    @property
    def head(self) -> Event | None:
        """The last event. Its `chain_hash` is of all that ever happened."""
        found = self._one(f"SELECT {_COLUMNS} FROM events ORDER BY number DESC LIMIT 1")
        return None if found is None else Event(*found)

    def fact(self, number: int) -> Fact:
        """
        Raises:
            FactError: no such fact stands.
            LedgerError: what stands there is no fact, as none was written.
        """
        found = self._one("SELECT number, after FROM facts WHERE fact = ?", number)
        if found is not None:
            return self._fact_of(*found)
        last = self._last_number("fact = ?", number)
        if not last:
            raise FactError(f"{self.path} has no fact {number}.")
        raise FactError(f"Fact {number} does not stand: event {last} took it away.")

    def facts(self, as_of: Moment | None = None) -> dict[int, Fact]:
        """The facts that stand, or stood at `as_of`, by number.

        Raises:
            LedgerError: there was no such event, or what stands is no fact, as none was written.
        """
        if as_of is None:
            rows = self._all("SELECT fact, number, after FROM facts ORDER BY fact")
        else:
            rows = self._all(_STANDING, self.number_at(as_of))
        return {fact: self._fact_of(number, content) for fact, number, content in rows}

    def events(self, as_of: Moment | None = None, after: int = 0) -> Iterator[Event]:
        """All events in their order, up to `as_of`; those behind number `after`."""
        last = self.number_at(as_of) if as_of is not None else 1 << 62
        between = "number > ? AND number <= ?"
        query = f"SELECT {_COLUMNS} FROM events WHERE {between} ORDER BY number"
        return (Event(*row) for row in self._all(query, after, last))

    def number_at(self, moment: Moment) -> int:
        """The number of the last event at `moment`; 0 before the first.

        Raises:
            LedgerError: there is no such event yet.
        """
        if isinstance(moment, int):
            last = self._last_number()
            if not 0 <= moment <= last:
                raise LedgerError(f"{self.path} has no event {moment}: its last is {last}.")
            return moment
        return self._last_number("time <= ?", stamp(moment))

    def verify(self, as_of: Moment | None = None) -> None:
        """Go through all events, or those that `as_of` rests on: hashes, numbers, and what each
        found before it. A time rests on the next event too, which says that it came later.

        Raises:
            LedgerError: one was changed, taken out or put in after it was written; says which. Or
                there was no such event.
        """
        count = -1 if as_of is None else self.number_at(as_of) + isinstance(as_of, datetime)
        chain, standing = START, dict[int | None, str]()
        # so many, whatever their numbers: where one is missing, the next is not as it was written
        query = f"SELECT {_COLUMNS} FROM events ORDER BY number LIMIT ?"
        for event in (Event(*row) for row in self._all(query, count)):
            self.refuse_changed(event, chain)
            if event.fact is not None and event.before != standing.get(event.fact):
                raise self._tampered(event.number)
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
            raise self._tampered(event.number)

    def _fact_of(self, number: int, content: str) -> Fact:
        """What event `number` says that stands."""
        try:
            return Fact.from_json(content)
        except (ValueError, TypeError) as error:
            self.verify()  # the first that is wrong is told
            raise self._tampered(number) from error

    def _tampered(self, number: int) -> LedgerError:
        said = f"{self.path} was tampered with: event {number} is not as it was written."
        before = self._last_number("number < ?", number)
        if not before:
            said += "\nIt is the first: nothing in this ledger can be relied on."
        elif self._in_file:
            said += (
                "\nWhat stood before it can go into a new one: `ullage memory export "
                f"{shlex.quote(str(self.path))} --as-of {before} --output FILE`, then `ullage "
                "memory add NEW.db --file FILE`."
            )
        return LedgerError(said)

    def _sound_head(self) -> Event | None:
        """The last event, which others are chained to: it has to follow the one before it. Where
        it does not, the first that is wrong is told."""
        rows = self._all(f"SELECT {_COLUMNS} FROM events ORDER BY number DESC LIMIT 2")
        events = [Event(*row) for row in rows]
        if events and not events[0].follows(events[1].chain_hash if events[1:] else START):
            self.verify()
            raise self._tampered(events[0].number)
        return events[0] if events else None

    def _last_number(self, which: str = "TRUE", *values: Any) -> int:
        """Of the events that are so; 0 of none. Those below 1 are of whoever tampered with it."""
        found = self._one(f"SELECT max(number) FROM events WHERE number > 0 AND {which}", *values)
        return int((found and found[0]) or 0)

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        return next(iter(self._all(query, *values)), None)

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        if is_stale(self._connection, self.path):
            self._connection.close()
            self._connection = connect(self.path, read_only=True)
        with our_errors(self.path):
            return self._connection.execute(query, values).fetchall()
