"""One line of a ledger, and the hashes that hold it in its place."""

import json
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Literal, Self

from ullage.techniques.larimar.fact import Fact

Action = Literal["add", "edit", "forget", "rollback"]
START = sha256(b"ullage ledger 1").hexdigest()  # before the first event


@dataclass(frozen=True)
class Event:
    """What happened to a fact, when, by whom and why.

    `fact` is the number of the event that first wrote it. `before` and `after` are the fact's
    JSON, None where it did not, or does not, stand. `content_hash` is of `after`; `chain_hash` of
    all that is here and of the event before.
    """

    number: int  # 1, 2, 3, ...
    time: str  # ISO, in UTC, with microseconds; never earlier than the event before
    actor: str
    reason: str
    action: Action
    fact: int
    before: str | None
    after: str | None
    asks: str | None
    content_hash: str
    chain_hash: str

    @classmethod
    def following(cls, head: "Event | None", **what: Any) -> Self:
        """The event after `head`, now, with its hashes."""
        now = stamp(datetime.now(UTC))
        time = now if head is None else max(now, head.time)  # clocks are set back
        bare = cls(
            number=1 if head is None else head.number + 1, time=time,
            content_hash=content_hash(what["after"]), chain_hash="", **what,
        )  # fmt: skip
        return bare.chained(START if head is None else head.chain_hash)

    def chained(self, before: str) -> Self:
        """Itself, behind an event of that chain hash."""
        held = {name: value for name, value in self.record.items() if name != "chain_hash"}
        text = json.dumps([before, held], ensure_ascii=False, separators=(",", ":"))
        return type(self)(**held, chain_hash=sha256(text.encode()).hexdigest())

    def follows(self, before: str) -> bool:
        """Whether it is as it was written, behind an event of that chain hash."""
        if any(isinstance(value, bytes) for value in self.record.values()):
            return False  # which SQLite takes in the place of text, or for it
        hashed = self.content_hash == content_hash(self.after)
        return hashed and self == self.chained(before)

    @property
    def record(self) -> dict[str, Any]:
        """Its columns, in their order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def fact_before(self) -> Fact | None:
        """What stood before."""
        return self._fact(self.before)

    @property
    def fact_after(self) -> Fact | None:
        """What stands after."""
        return self._fact(self.after)

    def _fact(self, content: str | None) -> Fact | None:
        return None if content is None else Fact.from_json(content)


def stamp(time: datetime) -> str:
    """An event's `time`: in the order of these texts is the order of times."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def content_hash(content: str | None) -> str:
    """Hex SHA-256 of a fact's JSON; of nothing where none stands."""
    return sha256((content or "").encode()).hexdigest()
