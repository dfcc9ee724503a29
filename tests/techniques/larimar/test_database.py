"""The file of a ledger: what it is not, who else has it, where it cannot be written."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ullage.errors import LedgerError
from ullage.techniques.larimar import database
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who

Capital = Callable[..., Fact]


def foreign(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in ("CREATE TABLE t (x)", *statements):
            connection.execute(statement)
    connection.close()


def test_what_is_no_ledger_is_left_alone(path: Path) -> None:
    for content, said in (
        (b"not a database" * 100, "it is not a database"),
        (b"SQLite format 3\0" + b"\xff" * 4000, "it is not a database|is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(LedgerError, match=said):
            Ledger(path, create=True)
        assert path.read_bytes() == content
    path.unlink()
    foreign(path)
    with pytest.raises(LedgerError, match="a database, but no ledger"):
        Ledger(path, create=True)


def test_a_ledger_of_another_version_is_refused(path: Path) -> None:
    foreign(path, f"PRAGMA application_id = {database._APPLICATION}", "PRAGMA user_version = 7")
    with pytest.raises(LedgerError, match="version 7, and this ullage has version 1"):
        Ledger(path)


def test_only_writing_begins_a_ledger(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"No ledger at .*memory add"):
        Ledger(path)
    assert not path.exists()
    path.touch()  # as a process that was killed at once leaves it
    with pytest.raises(LedgerError, match="holds nothing yet"):
        Ledger(path, read_only=True)
    with Ledger(path, create=True) as ledger:
        assert ledger.facts() == {}
    for place in (tmp_path, tmp_path / "nowhere" / "facts.db", Path("/proc/facts.db")):
        with pytest.raises(LedgerError, match=r"is a folder|cannot be opened"):
            Ledger(place, create=True)


def test_a_ledger_is_written_ahead_and_to_disk(ledger: Ledger) -> None:
    found = [ledger._all(f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous")]
    assert found == ["wal", 2]


def test_another_writer_is_waited_for(
    ledger: Ledger, opened: Callable[..., Ledger], capital: Capital, me: Who, path: Path
) -> None:
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.2, lambda: other.execute("COMMIT")).start()
    assert ledger.add([capital(1)], me).new == 1
    other.close()


def test_a_writer_that_does_not_end_is_our_error(
    opened: Callable[..., Ledger],
    capital: Capital,
    me: Who,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.1)
    first, second = opened(create=True), opened()
    with first._writing():
        with pytest.raises(LedgerError, match="being written by another process"):
            second.add([capital(1)], me)
        assert second.facts() == {}  # reading goes on
    assert second.add([capital(1)], me).new == 1


WRITER = """
import sys
from pathlib import Path
from ullage.techniques.larimar.ledger import Fact, Ledger, Who
with Ledger(Path(sys.argv[1]), create=True) as ledger:
    for number in range(25):
        ledger.add([Fact.make(f"The king of {sys.argv[2]}{number} is Bob")], Who(sys.argv[2]))
"""


def test_two_processes_begin_and_write_at_once(path: Path, opened: Callable[..., Ledger]) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("A", "B")
    ]
    assert [process.wait() for process in started] == [0, 0]
    ledger = opened()
    assert len(ledger.facts()) == 50
    ledger.verify()


def test_a_full_disk_leaves_nothing_of_what_was_to_be_written(
    ledger: Ledger, capital: Capital, me: Who
) -> None:
    ledger.add([capital(1)], me)
    pages = ledger._all("PRAGMA page_count")[0][0]
    ledger._all(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(LedgerError, match="the disk is full"):
        ledger.add([capital(number) for number in range(500)], me)
    assert ledger.facts() == {1: capital(1)}
    ledger._all("PRAGMA max_page_count = 10000")
    assert ledger.add([capital(number) for number in range(500)], me).new == 499
    ledger.verify()


def test_an_interrupt_leaves_nothing_of_what_was_to_be_written(
    ledger: Ledger, capital: Capital, me: Who
) -> None:
    def interrupted() -> object:
        yield capital(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.add(interrupted(), me)  # type: ignore[arg-type]
    assert ledger.facts() == {}
    assert ledger.add([capital(2)], me).numbers == [1]


# What root may do beyond others is left out, so that permissions count.
PLAIN = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
READER = """
import sys
from pathlib import Path
from ullage.errors import LedgerError
from ullage.techniques.larimar.ledger import Fact, Ledger, Who
try:
    with Ledger(Path(sys.argv[1]), read_only=sys.argv[2] != "write") as ledger:
        print(len(ledger.facts()), flush=True)
        if sys.argv[2] == "follow":
            for _ in sys.stdin:
                print(len(ledger.facts()), flush=True)
        if sys.argv[2] == "write":
            ledger.add([Fact.make("The king of Ys is Bob")], Who("me"))
except LedgerError as error:
    print(error)
"""


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Nobody but root can write the file, or in its folder."""
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        yield
    finally:
        path.parent.chmod(0o700)
        path.chmod(0o600)


@pytest.fixture
def reader(path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """`reader(what)`: a process that does `what`, and says what came of it."""
    if PLAIN and not shutil.which("setpriv"):
        pytest.skip("root may write anywhere, and there is no setpriv to be less")
    command = [*PLAIN, sys.executable, "-c", READER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return lambda what: subprocess.Popen([*command, what], text=True, **pipes)


@pytest.fixture
def read_only(path: Path, reader: Callable[[str], subprocess.Popen[str]]) -> Callable[[str], str]:
    """`read_only(what)`: what a process says that reads or writes in a folder that is read-only."""

    def act(what: str) -> str:
        with closed(path), reader(what) as process:
            return process.communicate()[0]

    return act


def test_a_read_only_ledger_is_read(
    read_only: Callable[[str], str], opened: Callable[..., Ledger], capital: Capital, me: Who
) -> None:
    with opened(create=True) as ledger:
        ledger.add([capital(1)], me)
    assert read_only("read") == "1\n"
    assert "read-only" in read_only("write")


def test_events_that_a_read_only_file_cannot_take_in_are_not_passed_over(
    read_only: Callable[[str], str],
    path: Path,
    opened: Callable[..., Ledger],
    capital: Capital,
    me: Who,
) -> None:
    ledger = opened(create=True)
    ledger.add([capital(1)], me)
    files = {file: file.read_bytes() for file in path.parent.glob(path.name + "*")}
    ledger._connection.close()
    for file, content in files.items():  # as a killed process leaves them
        if not file.name.endswith("-shm"):
            file.write_bytes(content)
    assert "its last events are in" in read_only("read")
    assert len(Ledger(path).facts()) == 1


@pytest.mark.parametrize("staying", [True, False])
def test_what_others_write_to_a_read_only_ledger_is_read(
    reader: Callable[[str], subprocess.Popen[str]],
    path: Path,
    opened: Callable[..., Ledger],
    capital: Capital,
    me: Who,
    staying: bool,
) -> None:
    """By who had it open before, whether the writer has it open still."""
    with opened(create=True) as ledger:
        ledger.add([capital(1)], me)
    with closed(path):
        process = reader("follow")
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "1\n"
    with process:
        for count in (2, 3):
            writer = Ledger(path)
            writer.add([capital(count)], me)
            if not staying:
                writer._connection.close()
            with closed(path):
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == f"{count}\n"
            writer._connection.close()
