"""Facts and what happened to them, for people and as JSON."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ullage.techniques.larimar.event import Event
from ullage.techniques.larimar.fact import Fact


def facts_as_json(facts: Mapping[int, Fact]) -> str:
    """A list of facts with their numbers."""
    return json.dumps([{"number": number, **asdict(fact)} for number, fact in facts.items()])


def show_facts(console: Console, facts: Mapping[int, Fact]) -> None:
    """Print a line a fact."""
    table = Table("fact", "subject", box=None, pad_edge=False)
    table.add_column("text", overflow="fold")
    for number, fact in facts.items():
        table.add_row(f"{number}", Text(fact.subject), Text(fact.text))
    if facts:
        console.print(table)


def events_as_json(events: Iterable[Event]) -> str:
    """A list of events, all that the ledger holds of each."""
    return json.dumps([_parsed(event) for event in events])


def show_events(console: Console, events: Iterable[Event]) -> None:
    """Print a line an event; what was changed stands above what it became."""
    table = Table("event", "time", "action", "fact", "by", "reason", box=None, pad_edge=False)
    table.add_column("text", overflow="fold")
    for event in events:
        time = event.time[:19].replace("T", " ")
        who = (Text(event.actor), Text(event.reason))
        table.add_row(f"{event.number}", time, event.action, f"{event.fact}", *who, _change(event))
    console.print(table)


def _change(event: Event) -> Text:
    before, after = event.fact_before, event.fact_after
    lines = [("- ", before)] if before else []
    lines += [("+ " if before else "", after)] if after else []
    return Text("\n".join(f"{sign}{fact.text}" for sign, fact in lines))


def _parsed(event: Event) -> dict[str, Any]:
    texts = {name: getattr(event, name) for name in ("before", "after")}
    return event.record | {name: text and json.loads(text) for name, text in texts.items()}
