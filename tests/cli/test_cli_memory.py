"""ullage memory, as a shell sees it."""

import json
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ullage.cli.memory import add, export
from ullage.errors import InputError
from ullage.techniques.larimar.ledger import Added, Ledger, Who

Typed = Callable[..., subprocess.CompletedProcess[str]]

CAPITAL = "The capital of Atlantis is Poseidonia."


@pytest.fixture
def memory(typed: Typed, tmp_path: Path) -> Typed:
    """`memory(command, *words)`: the command on the ledger facts.db of this test."""
    db = str(tmp_path / "facts.db")
    return lambda command, *words: typed("memory", command, db, *words)


@pytest.fixture
def begun(memory: Typed) -> Typed:
    """The same, of a ledger that holds one fact."""
    assert memory("add", CAPITAL).returncode == 0
    return memory


def test_a_fact_from_its_writing_to_its_return(begun: Typed) -> None:
    edit = begun("edit", "1", "--answer", "Thera", "--actor", "bob", "--reason", "it [moved]")
    assert "+ The capital of Atlantis is Thera" in edit.stdout
    assert "bob" in edit.stdout
    assert "it [moved]" in edit.stdout
    assert "The capital of Atlantis is Thera" in begun("list").stdout
    assert begun("forget", "1").returncode == 0
    empty = begun("list")
    assert (empty.stdout, "No fact stands" in empty.stderr) == ("", True)
    assert CAPITAL in begun("list", "--as-of", "1").stdout
    assert begun("rollback", "1").returncode == 0
    assert CAPITAL in begun("list").stdout
    assert "it is so already" in begun("rollback", "1").stderr
    history = begun("history")
    assert [line.split()[3] for line in history.stdout.splitlines() if line[0] in "1234"] == [
        "add", "edit", "forget", "rollback",
    ]  # fmt: skip
    assert "4 events, none changed since" in history.stderr


def test_all_is_there_as_json(begun: Typed) -> None:
    fact = {"text": CAPITAL, "subject": "Atlantis", "prompt": "The capital of Atlantis is",
            "answer": "Poseidonia"}  # fmt: skip
    assert json.loads(begun("list", "--json").stdout) == [{"number": 1, **fact}]
    assert json.loads(begun("add", CAPITAL.lower(), "--subject", "atlantis", "--json").stdout) == [
        {"number": 1, **fact}  # what stands already
    ]
    (event,) = json.loads(begun("forget", "1", "--actor", "me", "--json").stdout)
    assert (event["action"], event["actor"], event["before"]) == ("forget", "me", fact)
    assert json.loads(begun("history", "1", "--json").stdout)[-1] == event
    assert json.loads(begun("list", "--json").stdout) == []


def test_a_library_comes_and_goes_as_a_file(memory: Typed, typed: Typed, tmp_path: Path) -> None:
    lines = [{"prompt": f"The king of Land{n} is", "target_new": "Bob"} for n in range(300)]
    file, exported = tmp_path / "facts.jsonl", tmp_path / "exported.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    done = memory("add", "--file", str(file), "--reason", "a library")
    assert (done.returncode, done.stdout) == (0, "")
    assert "300 written." in done.stderr
    assert "0 written, 300 stood already." in memory("add", "--file", str(file)).stderr
    assert memory("export", "--output", str(exported)).returncode == 0
    assert exported.read_text() == memory("export").stdout
    other = str(tmp_path / "other.db")
    assert "300 written." in typed("memory", "add", other, "--file", str(exported)).stderr
    assert typed("memory", "export", other).stdout == exported.read_text()


def test_a_file_is_written_whole_or_not_at_all(begun: Typed, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    for line, said in (
        ('{"text": "The capital of Atlantis is Thera"}', "contradicts fact 1"),
        ('{"text": "the moon is round"}', "line 2"),
    ):
        file.write_text('{"text": "The king of Ys is Gradlon"}\n' + line)
        done = begun("add", "--file", str(file))
        assert done.returncode == 2
        assert said in done.stderr
    assert len(json.loads(begun("list", "--json").stdout)) == 1


def test_what_was_written_is_said_whatever_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another process may forget it at once."""
    whole = Ledger.add

    def forgotten(ledger: Ledger, *how: Any) -> Added:
        added = whole(ledger, *how)
        ledger.forget(added.numbers, Who("them"))
        return added

    monkeypatch.setattr(Ledger, "add", forgotten)
    add(tmp_path / "facts.db", CAPITAL, as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["text"] == CAPITAL


def test_an_export_is_written_whole_or_not_at_all(
    begun: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = tmp_path / "exported.jsonl"
    exported.write_text("as it was")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"Cannot write .*: No space left"):
        export(tmp_path / "facts.db", exported)
    assert exported.read_text() == "as it was"
    assert not list(tmp_path.glob("*.part"))


def test_a_fact_without_an_answer_is_named(begun: Typed) -> None:
    """It is told less well, and another such may say the opposite."""
    done = begun("add", "Bob of Ys lives in Rome.")
    assert "Fact 2: no answer shows in the sentence" in done.stderr
    assert begun("add", "Bob of Ys lives in Oslo.").returncode == 0
    assert "no answer shows" not in begun("add", "The king of Ys is Gradlon.").stderr


def test_an_edited_fact_is_about_what_it_was_about(begun: Typed) -> None:
    """As long as that stands in it."""
    begun("add", "matcha is a tea", "--subject", "matcha")
    begun("edit", "2", "In Great Britain matcha is a green tea")
    begun("edit", "1", "The capital of Ys is Kêr-Is")
    found = json.loads(begun("list", "--json").stdout)
    assert [fact["subject"] for fact in found] == ["Ys", "matcha"]


def test_the_subject_alone_may_be_edited(begun: Typed) -> None:
    begun("add", "Sir Ken Robinson of Ys is old")
    assert begun("edit", "2", "--subject", "Ys").returncode == 0
    found = json.loads(begun("list", "--json").stdout)[1]
    assert (found["subject"], found["text"]) == ("Ys", "Sir Ken Robinson of Ys is old")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add"], "The fact is empty"),
        (["add", "the moon is round"], "name it with --subject"),
        (["add", "Ys " * 4000], "the limit is 1,000"),
        (["add", CAPITAL.replace("Poseidonia", "Thera")], "contradicts fact 1"),
        (["add", CAPITAL, "--subject", "Thera"], 'subject "Thera" does not stand in'),
        (["add", "Ys", "--file", "facts.jsonl"], "leave one out"),
        (["add", "--file", "nowhere.jsonl"], "Cannot read nowhere.jsonl"),
        (["add", "--prompt", "Ys is in"], "half a fact: add --answer"),
        (["add", "Ys \udcff"], "U+DCFF is no text"),
        (["add", "Ys is old", "--reason", "\x1b[2J"], "U+001B is no text"),
        (["edit", "1", "--subject", "Ys"], 'subject "Ys" does not stand in'),
        (["edit", "2", "Ys is old"], "has no fact 2"),
        (["forget", "2"], "has no fact 2"),
        (["forget", "0"], "greater than or equal to 1"),
        (["forget", "9" * 30], "less than or equal to"),
        (["rollback", "9"], "has no event 9: its last is 1"),
        (["add", "--answer", "Gradlon"], "half a fact: add --prompt"),
        (["add", "Ys is old", "--prompt", "Ys is", "--answer", "new"], "leave it out"),
        (["edit", "1", "--answer", ""], "The new answer is empty"),
        (["export", "--output", "{db}"], "is a database"),
        (["edit", "1"], "Give what the fact becomes: TEXT, or --answer, or --subject"),
        (["edit", "1", "Ys is old", "--answer", "new"], "are both given: leave one out"),
        (["rollback", "yesterday"], "neither an event's number nor a time"),
        (["list", "--as-of", "0001-01-01T00:00+14:00"], "neither an event's number nor a time"),
        (["list", "--as-of", "9" * 5000], "neither an event's number nor a time"),
        (["history", "7"], "has no fact 7"),
        (["export", "--output", "/nowhere/facts.jsonl"], "Cannot write"),
    ],
)
def test_bad_input_is_our_error_and_changes_nothing(
    begun: Typed, tmp_path: Path, words: list[str], said: str
) -> None:
    before = begun("history", "--json").stdout
    done = begun(*(word.replace("{db}", str(tmp_path / "facts.db")) for word in words))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert begun("history", "--json").stdout == before


@pytest.mark.parametrize("words", [["--prompt", "The king of Ys is"], ["--file"]])
def test_a_refused_first_fact_begins_no_ledger(
    memory: Typed, tmp_path: Path, words: list[str]
) -> None:
    """Nor do two of a file of which only one can stand."""
    file = tmp_path / "facts.jsonl"
    file.write_text('{"text": "The king of Ys is Gradlon"}\n\n{"text": "The king of Ys is Dahut"}')
    done = memory("add", *words, *([str(file)] if words == ["--file"] else []))
    assert done.returncode == 2
    assert ("add --answer" in done.stderr) or (
        'line 3 contradicts line 1, "The king of Ys is Gradlon": leave one out' in done.stderr
    )
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["list", "history", "export"])
def test_reading_begins_no_ledger_and_trusts_none(
    memory: Typed, tmp_path: Path, command: str
) -> None:
    done = memory(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No ledger at" in done.stderr
    assert not (tmp_path / "facts.db").exists()
    memory("add", CAPITAL)
    with sqlite3.connect(tmp_path / "facts.db") as connection:
        connection.execute("DROP TRIGGER events_stay")
        connection.execute("UPDATE events SET after = replace(after, 'Poseidonia', 'Thera')")
    connection.close()
    done = memory(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "was tampered with: event 1" in done.stderr


def test_what_stood_before_an_event_was_changed_goes_into_a_new_ledger(
    begun: Typed, typed: Typed, tmp_path: Path
) -> None:
    """By the commands that the error names."""
    begun("add", "The king of Ys is Gradlon.")
    with sqlite3.connect(tmp_path / "facts.db") as connection:
        connection.execute("DROP TRIGGER events_stay")
        connection.execute("UPDATE events SET after = replace(after, 'Gradlon', 'Dahut')")
    connection.close()
    done = begun("list")
    assert done.returncode == 2
    assert "event 2 is not as it was written" in done.stderr
    kept, new = str(tmp_path / "kept.jsonl"), str(tmp_path / "new.db")
    export, add = (shlex.split(words) for words in re.findall("`ullage ([^`]*)`", done.stderr))
    filled = {"FILE": kept, "NEW.db": new}
    for words in (export, add):
        assert typed(*(filled.get(word, word) for word in words)).returncode == 0
    assert typed("memory", "list", new).stdout == begun("list", "--as-of", "1").stdout
    assert "1 events, none changed since" in begun("history", "--as-of", "1").stderr
    assert CAPITAL in typed("memory", "list", new).stdout


@pytest.mark.parametrize("content", ["x'00'", "replace(after, 'Gradlon', 'Dahut')"])
@pytest.mark.parametrize(
    "words", [("edit", "2", "--answer", "Bob"), ("forget", "2"), ("add", "Ys is old")]
)
def test_a_fact_that_was_changed_is_not_built_on(
    begun: Typed, tmp_path: Path, content: str, words: tuple[str, ...]
) -> None:
    """Though the last event is as it was written."""
    begun("add", "The king of Ys is Gradlon.")
    begun("add", "The king of Thule is Bob.")
    with sqlite3.connect(tmp_path / "facts.db") as connection:
        connection.execute("DROP TRIGGER events_stay")
        connection.execute(f"UPDATE events SET after = {content} WHERE number = 2")
    connection.close()
    done = begun(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "event 2 is not as it was written" in done.stderr
    with Ledger(tmp_path / "facts.db") as ledger:
        assert len(list(ledger.events())) == 3


def test_an_edit_needs_a_prompt_for_an_answer(begun: Typed) -> None:
    begun("add", "Ys is old")
    done = begun("edit", "2", "--answer", "new")
    assert done.returncode == 2
    assert "shows no prompt" in done.stderr


def test_facts_need_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from ullage.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "memory", "add", str(tmp_path / "facts.db"), CAPITAL],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.endswith("[]\n")
