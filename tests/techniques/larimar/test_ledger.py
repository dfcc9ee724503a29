"""What a ledger is: events that stay, and the facts that stand after them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.errors import FactError, LedgerError
from ullage.techniques.larimar import event as event_module
from ullage.techniques.larimar.event import Event, content_hash
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who

Capital = Callable[..., Fact]


def texts(ledger: Ledger, *as_of: int | datetime) -> list[str]:
    return [fact.text.removeprefix("The capital of ") for fact in ledger.facts(*as_of).values()]


def test_facts_stand_as_the_last_event_left_them(
    ledger: Ledger, capital: Capital, me: Who, opened: Callable[..., Ledger]
) -> None:
    added = ledger.add([capital(1), capital(2), capital(3)], me)
    assert (added.numbers, added.new) == ([1, 2, 3], 3)
    ledger.edit(2, capital(2, "Ys"), me)
    ledger.forget([1], me)
    for found in (ledger, opened(), opened(read_only=True)):
        assert texts(found) == ["Land2 is Ys.", "Land3 is Thera."]
        found.verify()
    actions = [(event.number, event.action, event.fact) for event in ledger.events()]
    assert actions == [
        (1, "add", 1),
        (2, "add", 2),
        (3, "add", 3),
        (4, "edit", 2),
        (5, "forget", 1),
    ]
    edit = list(ledger.events())[3]
    assert (edit.fact_before, edit.fact_after) == (capital(2), capital(2, "Ys"))
    assert (edit.actor, edit.reason) == ("me", "a test")
    assert edit.content_hash == content_hash(capital(2, "Ys").content)


def test_a_ledger_is_what_it_was_at_any_event_or_time(
    ledger: Ledger, capital: Capital, me: Who
) -> None:
    ledger.add([capital(1)], me)
    between = datetime.now(UTC)
    ledger.edit(1, capital(1, "Ys"), me)
    ledger.forget([1], me)
    assert [texts(ledger, at) for at in range(4)] == [[], ["Land1 is Thera."], ["Land1 is Ys."], []]
    assert texts(ledger, between) == ["Land1 is Thera."]
    assert texts(ledger, between.astimezone(None)) == ["Land1 is Thera."]
    assert texts(ledger, between - timedelta(days=1)) == []
    assert [event.number for event in ledger.events(as_of=between)] == [1]
    for at in (4, -1):
        with pytest.raises(LedgerError, match=f"has no event {at}: its last is 3"):
            ledger.facts(at)


def test_rolling_back_is_events_too(ledger: Ledger, capital: Capital, me: Who) -> None:
    """So it can be rolled back itself."""
    ledger.add([capital(1), capital(2), capital(3)], me)  # 3
    ledger.forget([1], me)
    ledger.edit(2, capital(2, "Ys"), me)
    ledger.add([capital(4)], me)  # 6
    before = ledger.facts()
    events = ledger.rollback(3, me)
    assert [event.fact for event in events] == [1, 2, 6]
    assert ledger.facts() == ledger.facts(3)
    ledger.rollback(6, me)
    assert ledger.facts() == before
    assert ledger.rollback(6, me) == []
    ledger.rollback(0, me)
    assert ledger.facts() == {}
    ledger.verify()


def test_what_stands_already_is_not_written_again(
    ledger: Ledger, capital: Capital, me: Who
) -> None:
    ledger.add([capital(1), capital(2)], me)
    again = ledger.add([capital(2), capital(1, "THERA"), capital(3), capital(3)], me)
    assert (again.numbers, again.new) == ([2, 1, 3, 3], 1)
    assert again.facts == {2: capital(2), 1: capital(1), 3: capital(3)}  # not as it was said now
    assert ledger.edit(1, capital(1), me) is None
    assert len(list(ledger.events())) == 3


def test_a_contradiction_names_the_fact_and_writes_nothing(
    ledger: Ledger, capital: Capital, me: Who
) -> None:
    ledger.add([capital(1), capital(2)], me)
    with pytest.raises(FactError, match=r"contradicts fact 2, .*Thera.*: edit that one"):
        ledger.add([capital(3), capital(2, "Ys")], me)
    with pytest.raises(FactError, match="contradicts another that is to be written"):
        ledger.add([capital(3), capital(3, "Ys")], me)
    with pytest.raises(FactError, match="contradicts fact 1"):
        ledger.edit(2, capital(1, "Ys"), me)
    with pytest.raises(FactError, match="Fact 1 says that already"):
        ledger.edit(2, capital(1), me)
    assert len(list(ledger.events())) == 2
    ledger.forget([2], me)
    assert ledger.add([capital(2, "Ys")], me).new == 1  # what was forgotten contradicts nothing


def test_what_does_not_stand_cannot_be_changed(ledger: Ledger, capital: Capital, me: Who) -> None:
    ledger.add([capital(1), capital(2)], me)
    ledger.forget([1, 1], me)
    with pytest.raises(FactError, match="Fact 1 does not stand: event 3 took it away"):
        ledger.edit(1, capital(1, "Ys"), me)
    with pytest.raises(FactError, match="has no fact 9"):
        ledger.forget([2, 9], me)
    assert texts(ledger) == ["Land2 is Thera."]


def test_time_never_runs_back(
    ledger: Ledger, capital: Capital, me: Who, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2000, 1, 1, tzinfo=UTC)

    ledger.add([capital(1)], me)
    monkeypatch.setattr(event_module, "datetime", Earlier)
    ledger.add([capital(2)], me)
    first, second = ledger.events()
    assert first.time == second.time


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET after = replace(after, 'Thera', 'Ys') WHERE number = 2",
        "UPDATE events SET actor = 'you' WHERE number = 2",
        "UPDATE events SET actor = x'00' WHERE number = 2",
        "UPDATE events SET after = x'00' WHERE number = 3",
        "UPDATE events SET actor = CAST(x'ff' AS TEXT) WHERE number = 3",
        "UPDATE events SET number = 9 WHERE number = 3",
        "DELETE FROM events WHERE number = 2",
        "DELETE FROM events WHERE number = 1",
        "INSERT INTO events SELECT 4, time, actor, reason, action, 4, before, after, asks, "
        "content_hash, chain_hash FROM events WHERE number = 3",
    ],
)
def test_tampering_shows(ledger: Ledger, capital: Capital, me: Who, change: str) -> None:
    ledger.add([capital(1), capital(2), capital(3)], me)
    ledger.verify()
    if not change.startswith("INSERT"):
        with pytest.raises(Exception, match="an event is never"):
            ledger._connection.execute(change)
        ledger.verify()
    for trigger in ("events_stay", "events_last"):
        ledger._connection.execute(f"DROP TRIGGER {trigger}")
    ledger._connection.execute(change)
    with pytest.raises(LedgerError, match="was tampered with: event"):
        ledger.verify()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET after = replace(after, 'Thera', 'Ys') WHERE number = 3",
        "UPDATE events SET content_hash = '0' WHERE number = 3",
        "UPDATE events SET number = 9 WHERE number = 3",
        "DELETE FROM events WHERE number = 2",
        "DELETE FROM events WHERE number < 3",
    ],
)
def test_nothing_is_chained_to_what_was_tampered_with(
    ledger: Ledger, capital: Capital, me: Who, change: str
) -> None:
    ledger.add([capital(1), capital(2), capital(3)], me)
    for trigger in ("events_stay", "events_last"):
        ledger._connection.execute(f"DROP TRIGGER {trigger}")
    ledger._connection.execute(change)
    before = list(ledger.events())
    for write in (
        lambda: ledger.add([capital(4)], me),
        lambda: ledger.edit(3, capital(3, "Is"), me),
        lambda: ledger.forget([3], me),
        lambda: ledger.rollback(0, me),
    ):
        with pytest.raises(LedgerError, match="was tampered with: event"):
            write()
    assert list(ledger.events()) == before


@pytest.mark.parametrize("content", ["x'00'", "'[1]'", "'{}'", "CAST(x'ff' AS TEXT)"])
def test_what_is_no_fact_is_told_as_the_tampering_that_it_is(
    ledger: Ledger, capital: Capital, me: Who, content: str
) -> None:
    """Also by what reads it without going through all events."""
    ledger.add([capital(1), capital(2), capital(3)], me)
    ledger._connection.execute("DROP TRIGGER events_stay")
    ledger._connection.execute(f"UPDATE events SET after = {content} WHERE number = 2")
    for read in (
        lambda: ledger.fact(2),
        lambda: ledger.facts(),
        lambda: ledger.facts(2),
        lambda: ledger.edit(2, capital(2, "Ys"), me),
        lambda: ledger.forget([2], me),
        lambda: ledger.rollback(0, me),
    ):
        with pytest.raises(LedgerError, match="event 2 is not as it was written"):
            read()
    assert ledger.facts(1) == {1: capital(1)}
    assert len(list(ledger.events())) == 3


@pytest.mark.parametrize(
    ("change", "whole"),
    [
        ("UPDATE events SET after = replace(after, 'Thera', 'Ys') WHERE number = 3", 2),
        ("UPDATE events SET actor = CAST(x'ff' AS TEXT) WHERE number = 3", 2),
        ("UPDATE events SET number = 9 WHERE number = 3", 2),
        ("DELETE FROM events WHERE number = 2", 1),
        ("UPDATE events SET actor = 'you' WHERE number = 1", 0),
        ("UPDATE events SET number = -5 WHERE number = 1", 0),
    ],
)
def test_what_stood_before_a_change_is_still_told(
    ledger: Ledger, capital: Capital, me: Who, change: str, whole: int
) -> None:
    """By the number of an event; and whoever reads or writes is told which is the first wrong."""
    ledger.add([capital(1), capital(2), capital(3), capital(4)], me)
    for trigger in ("events_stay", "events_last"):
        ledger._connection.execute(f"DROP TRIGGER {trigger}")
    ledger._connection.execute(change)
    for at in range(whole + 1):
        ledger.verify(at)
        assert len(ledger.facts(at)) == at
    said = f"--as-of {whole} --output FILE" if whole else "It is the first: nothing"
    for at in (whole + 1, 4, None):
        with pytest.raises(LedgerError, match="was tampered with: event") as error:
            ledger.verify(at)
        assert said in str(error.value)
    ledger._connection.execute("UPDATE events SET reason = 'none' WHERE number = 4")
    with pytest.raises(LedgerError) as error:
        ledger.forget([4], me)
    assert said in str(error.value)


def test_a_last_event_that_is_wrong_is_never_chained_to(
    ledger: Ledger, capital: Capital, me: Who, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no earlier one is found to be wrong."""
    ledger.add([capital(1)], me)
    ledger._connection.execute("DROP TRIGGER events_stay")
    ledger._connection.execute("UPDATE events SET actor = 'you'")
    monkeypatch.setattr(ledger, "verify", lambda: None)
    with pytest.raises(LedgerError, match="event 1 is not as it was written"):
        ledger.add([capital(2)], me)


def test_a_time_rests_on_the_next_event_too(ledger: Ledger, capital: Capital, me: Who) -> None:
    """Else one that was put off would not be missed."""
    ledger.add([capital(1)], me)
    between = datetime.now(UTC)
    for number in (2, 3):
        ledger.add([capital(number)], me)
    now = datetime.now(UTC)
    ledger._connection.execute("DROP TRIGGER events_stay")
    ledger._connection.execute("UPDATE events SET time = '9' || time WHERE number = 3")
    assert len(ledger.facts(now)) == 2
    ledger.verify(between)
    with pytest.raises(LedgerError, match="event 3 is not as it was written"):
        ledger.verify(now)


def test_an_event_that_does_not_follow_shows_though_it_is_chained(
    ledger: Ledger, capital: Capital, me: Who
) -> None:
    ledger.add([capital(1)], me)
    first = ledger.head
    assert first is not None
    of_one = {"fact": 1, "asks": None, "actor": "me", "reason": "", "action": "edit"}
    other = capital(1, "Ys").content
    event = Event.following(first, before=other, after=other, **of_one)
    hashed = Event.following(first, before=capital(1).content, after=other, **of_one)
    for wrong in (event, replace(hashed, content_hash="0").chained(first.chain_hash)):
        values = tuple(wrong.record.values())
        ledger._all(f"INSERT INTO events VALUES ({', '.join('?' * len(values))})", *values)
        with pytest.raises(LedgerError, match="event 2 is not as it was written"):
            ledger.verify()
        ledger._all("DROP TRIGGER IF EXISTS events_last")
        ledger._all("DELETE FROM events WHERE number = 2")


def test_who_is_said_in_text() -> None:
    with pytest.raises(FactError, match=r"U\+001B"):
        Who("me", "\x1b[2J")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.integers(0, 2)),
        st.tuples(st.just("edit"), st.integers(0, 5), st.integers(0, 2)),
        st.tuples(st.just("forget"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("rollback"), st.integers(0, 20), st.just(0)),
    ),
    max_size=20,
)


@given(steps=STEPS)
@settings(max_examples=30)
def test_replay_agrees_with_what_stood(steps: list[tuple[str, int, int]]) -> None:
    """Against a dictionary: after any steps, the view, any `as_of` and the chain agree."""
    me, states = Who("me"), [dict[int, Fact]()]
    with TemporaryDirectory() as folder, Ledger(Path(folder) / "db", create=True) as ledger:
        ledger._all("PRAGMA synchronous = OFF")  # no disk is as quick as these steps
        for action, land, city in steps:
            fact = Fact.make(f"The capital of Land{land} is City{city}")
            try:
                if action == "add":
                    ledger.add([fact], me)
                elif action == "edit":
                    ledger.edit(land, fact, me)
                elif action == "forget":
                    ledger.forget([land], me)
                else:
                    ledger.rollback(land, me)
            except (FactError, LedgerError):
                assert ledger.facts() == states[-1]
            for event in ledger.events():
                if event.number >= len(states):
                    state = dict(states[-1])
                    assert event.fact is not None
                    assert state.pop(event.fact, None) == event.fact_before
                    if event.fact_after:
                        state[event.fact] = event.fact_after
                    states.append(state)
            assert ledger.facts() == states[-1]
        assert [ledger.facts(at) for at in range(len(states))] == states
        asked = [fact.asks for fact in states[-1].values()]
        assert len(asked) == len(set(asked))
        ledger.verify()


def test_a_ledger_may_be_in_no_file(capital: Capital, me: Who) -> None:
    with Ledger.in_memory() as ledger, Ledger.in_memory() as other:
        ledger.add([capital(1)], me)
        ledger.edit(1, capital(1, "Ys"), me)
        ledger.verify()
        assert texts(ledger) == ["Land1 is Ys."]
        assert texts(other) == []
        assert [event.action for event in ledger.events(after=1)] == ["edit"]
        assert list(ledger.events(after=2)) == []
        with pytest.raises(FactError, match="this ledger has no fact 2"):
            ledger.forget([2], me)
        ledger._connection.execute("DROP TRIGGER events_stay")
        ledger._connection.execute("UPDATE events SET actor = 'you' WHERE number = 2")
        with pytest.raises(LedgerError, match="event 2 is not as it was written") as error:
            ledger.verify()
        assert "ullage memory" not in str(error.value)  # no command reads it


def test_an_edit_of_what_was_edited_meanwhile_is_refused(ledger: Ledger, me: Who) -> None:
    """Else the other's edit would be undone by one that never saw it."""
    first = Fact.make("The capital of Atlantis is Poseidonia.")
    number = ledger.add([first], me).numbers[0]
    ledger.edit(number, Fact.make("The king of Atlantis is Poseidon."), me)
    with pytest.raises(FactError, match="edited meanwhile"):
        ledger.edit(number, first.edited(answer="Thera"), me, first)


def test_who_and_why_are_a_line_each(ledger: Ledger) -> None:
    who = Who("me", "so\n2  add  nobody")
    ledger.add([Fact.make("The capital of Atlantis is Poseidonia.")], who)
    assert ledger.head is not None
    assert ledger.head.reason == "so 2 add nobody"
