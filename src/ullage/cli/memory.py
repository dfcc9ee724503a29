"""ullage memory: facts in a ledger, written, edited, forgotten, rolled back. No torch."""

import getpass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from ullage.cli.options import MemoryOption, ModelArgument
from ullage.cli.show.remembered import events_as_json, facts_as_json, show_events, show_facts
from ullage.cli.written import refuse_unwritable, write_text
from ullage.errors import FactError, InputError
from ullage.techniques.larimar.event import Event
from ullage.techniques.larimar.fact import Fact, read_facts
from ullage.techniques.larimar.history import Moment
from ullage.techniques.larimar.ledger import Ledger, Who

_SHOWN = 20  # facts of a file are too many to print
_MOST = 1 << 31  # of events: SQLite counts further, and nobody does

memory = typer.Typer(
    help="Write, edit and forget facts in a ledger that lasts, and ask a model with them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

LedgerArgument = Annotated[
    Path, typer.Argument(metavar="DB", help="The ledger's file.", show_default=False)
]
FactArgument = Annotated[
    int, typer.Argument(metavar="FACT", min=1, max=_MOST, help="Its number in `list`.")
]
SubjectOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What the fact is about. Default: the longest name in its prompt."
    ),
]
PromptOption = Annotated[
    str | None, typer.Option(help="With --answer, in place of TEXT: what the answer follows.")
]
AsOfOption = Annotated[
    str | None,
    typer.Option(
        metavar="EVENT|TIME",
        help="As it was after an event of `history`, or at a time, UTC unless it says otherwise: "
        "2026-01-31T18:00.",
    ),
]
ActorOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who does it. Default: the user.")
]
ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Why, for the history.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


@memory.command()
def add(
    db: LedgerArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="A fact, in a sentence.")
    ] = None,
    subject: SubjectOption = None,
    prompt: PromptOption = None,
    answer: Annotated[str | None, typer.Option(help="What follows the prompt.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FACTS.jsonl",
            help="Facts, a line each: a JSON object of text, or of prompt and answer, and perhaps "
            "subject. All are written, or none.",
        ),
    ] = None,
    actor: ActorOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write facts; begins the ledger where there is none.

    A fact that contradicts one that stands, in the answer to the same prompt, is refused. One that
    stands already is not written again.
    """
    who = _who(actor, reason)
    if file is None:
        _refuse_half(prompt, answer)
        facts = [Fact.make(text, subject, prompt, answer)]
    elif any(given is not None for given in (text, subject, prompt, answer)):
        raise InputError("--file and a fact: leave one out.")
    else:
        facts = read_facts(file)
    with Ledger(db, create=True) as ledger:
        ledger.verify()
        shown = track(
            facts, "writing", console=_stderr(), transient=True, disable=len(facts) <= _SHOWN
        )
        added = ledger.add(shown, who)
    if as_json:
        typer.echo(facts_as_json(added.facts))
    elif len(facts) <= _SHOWN:
        show_facts(_stdout(), added.facts)
    _say_whole(added.facts)
    stood = len(facts) - added.new
    _say(f"{added.new:,} written" + (f", {stood:,} stood already." if stood else "."))


@memory.command("list")
def list_facts(db: LedgerArgument, as_of: AsOfOption = None, as_json: JsonOption = False) -> None:
    """Print the facts that stand."""
    facts = _standing(db, as_of)
    if as_json:
        typer.echo(facts_as_json(facts))
        return
    show_facts(_stdout(), facts)
    if not facts:
        _say(f"No fact {'stands' if as_of is None else 'stood then'} in {db}.")


@memory.command()
def ask(
    model: ModelArgument,
    db: LedgerArgument,
    question: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model goes on from.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to it.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Write this many at most.")] = 32,
    budget: MemoryOption = None,
) -> None:
    """Let a model go on from a prompt that may be about a fact, as `ullage run --facts` does."""
    from ullage.cli.run import run

    run(model, prompt=question, facts=db, chat=chat, max_new_tokens=max_new_tokens, memory=budget)


@memory.command()
def edit(
    db: LedgerArgument,
    fact: FactArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What it becomes, in a sentence.")
    ] = None,
    subject: SubjectOption = None,
    answer: Annotated[
        str | None, typer.Option(help="In place of TEXT: the new answer to its prompt.")
    ] = None,
    actor: ActorOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Put another fact in the place of one; it keeps its number. --subject alone changes what it is
    about, and not what it says."""
    who = _who(actor, reason)
    if text is None and answer is None and subject is None:
        raise InputError("Give what the fact becomes: TEXT, or --answer, or --subject.")
    if text is not None and answer is not None:
        raise InputError("TEXT and --answer are both given: leave one out.")
    with Ledger(db) as ledger:
        ledger.verify()
        was = ledger.fact(fact)
        event = ledger.edit(fact, was.edited(text, answer, subject), who, was)
    _changed([] if event is None else [event], as_json)


@memory.command()
def forget(
    db: LedgerArgument,
    facts: Annotated[
        list[int],
        typer.Argument(metavar="FACT", min=1, max=_MOST, help="Their numbers in `list`."),
    ],
    actor: ActorOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Let facts stand no longer. The history keeps what they said."""
    who = _who(actor, reason)
    with Ledger(db) as ledger:
        ledger.verify()
        events = ledger.forget(facts, who)
    _changed(events, as_json)


@memory.command()
def rollback(
    db: LedgerArgument,
    to: Annotated[str, typer.Argument(metavar="EVENT|TIME", help="0 is before the first event.")],
    actor: ActorOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Let the facts stand that stood after an event or at a time. That can be rolled back, too."""
    who = _who(actor, reason)
    moment = _moment(to)
    assert moment is not None
    with Ledger(db) as ledger:
        ledger.verify()
        events = ledger.rollback(moment, who)
    _changed(events, as_json)


@memory.command()
def history(
    db: LedgerArgument,
    fact: Annotated[
        int | None,
        typer.Argument(metavar="FACT", min=1, max=_MOST, help="Of one fact alone."),
    ] = None,
    as_of: AsOfOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what happened, and see that nothing was changed since."""
    moment = _moment(as_of)
    with Ledger(db, read_only=True) as ledger:
        ledger.verify(moment)
        every = list(ledger.events(as_of=moment))
    events = [event for event in every if fact in (None, event.fact)]
    if fact is not None and not events:
        raise FactError(f"{db} has no fact {fact}.")
    if as_json:
        typer.echo(events_as_json(events))
    elif events:
        show_events(_stdout(), events)
    if every:
        head = every[-1]
        _say(f"{head.number:,} events, none changed since; their hash is {head.chain_hash}.")


@memory.command()
def export(
    db: LedgerArgument,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: stdout.", show_default=False)
    ] = None,
    as_of: AsOfOption = None,
) -> None:
    """Write the facts that stand as JSON Lines, for `add --file`."""
    if output is not None:
        refuse_unwritable(output)
    facts = _standing(db, as_of)
    lines = "".join(f"{fact.content}\n" for fact in facts.values())
    if output is None:
        typer.echo(lines, nl=False)
    else:
        write_text(output, lines)
        _say(f"{len(facts):,} facts in {output}.")


def _say_whole(facts: dict[int, Fact]) -> None:
    """Name the facts that no prompt can be asked of."""
    whole = [number for number, fact in facts.items() if not fact.answer]
    if whole:
        first = f"Fact {whole[0]}" + (f" and {len(whole) - 1:,} more" if whole[1:] else "")
        _say(
            f"{first}: no answer shows in the sentence, so that it is kept whole, told less well, "
            "and contradicts nothing: --prompt and --answer say it better."
        )


def _standing(db: Path, as_of: str | None) -> dict[int, Fact]:
    """The facts that stand, or stood; what they rest on was gone through."""
    moment = _moment(as_of)
    with Ledger(db, read_only=True) as ledger:
        ledger.verify(moment)
        return ledger.facts(moment)


def _refuse_half(prompt: str | None, answer: str | None) -> None:
    if bool(prompt) != bool(answer):
        given, missing = ("--prompt", "--answer") if prompt else ("--answer", "--prompt")
        raise InputError(f"{given} is half a fact: add {missing}, or give TEXT alone.")


def _changed(events: list[Event], as_json: bool) -> None:
    if as_json:
        typer.echo(events_as_json(events))
    elif events:
        show_events(_stdout(), events)
    else:
        _say("Nothing to change: it is so already.")


def _moment(given: str | None) -> Moment | None:
    if given is None:
        return None
    try:
        if given.isdecimal():
            return int(given)
        time = datetime.fromisoformat(given)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{given[:80]!r} is neither an event's number nor a time as in 2026-01-31T18:00."
        ) from error


def _who(actor: str | None, reason: str) -> Who:
    if actor is None:
        try:
            actor = getpass.getuser()
        except (KeyError, OSError, ImportError):  # a container's user may have no name
            actor = "unknown"
    return Who(actor, reason)


def _say(text: str) -> None:
    _stderr().print(escape(text), soft_wrap=True)


def _stdout() -> Console:
    return Console(highlight=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)
