"""The SQLite file that a ledger lies in: opened, begun, written to whole or not at all."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from ullage.errors import LedgerError

SCHEMA = 1  # the version; what changes a table or what is hashed raises it
BUSY_S = 5.0  # that another process is waited for
_APPLICATION = 0x756C6C67  # "ullg", where `file` and others look
_RETRY_S = 0.02

# An event is never changed. `fact` is the number of the event that first wrote the fact; `before`
# and `after` are its JSON; `asks` is what no two facts that stand may have in common.
_TABLES = (
    """CREATE TABLE events (
        number INTEGER PRIMARY KEY,
        time TEXT NOT NULL,
        actor TEXT NOT NULL,
        reason TEXT NOT NULL,
        action TEXT NOT NULL CHECK (action IN ('add', 'edit', 'forget', 'rollback')),
        fact INTEGER NOT NULL,
        before TEXT,
        after TEXT,
        asks TEXT,
        content_hash TEXT NOT NULL,
        chain_hash TEXT NOT NULL
    )""",
    "CREATE INDEX events_of_fact ON events (fact)",
    "CREATE INDEX events_asking ON events (asks)",
    """CREATE VIEW facts AS
        SELECT fact, after, asks, number FROM events AS latest
        WHERE after IS NOT NULL
        AND number = (SELECT max(number) FROM events WHERE fact = latest.fact)""",
    """CREATE TRIGGER events_stay BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'an event is never changed'); END""",
    """CREATE TRIGGER events_last BEFORE DELETE ON events
        BEGIN SELECT RAISE(ABORT, 'an event is never deleted'); END""",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {SCHEMA}",
)


def connect(path: Path, create: bool = False, read_only: bool = False) -> sqlite3.Connection:
    """The ledger's file, begun with `create` where there is none.

    What is committed is on disk (WAL, synchronous=FULL): neither a killed process nor a machine
    that loses its power takes it away. With `read_only` a file or folder that cannot be written
    will do; see `is_stale`.

    Raises:
        LedgerError: there is none, it is no ledger, of another version, or cannot be opened.
    """
    if path.is_dir():
        raise LedgerError(f"{path} is a folder: name a file, such as facts.db.")
    if not path.exists() and not create:
        raise LedgerError(f'No ledger at {path}: `ullage memory add {path} "..."` begins one.')
    with our_errors(path):
        try:
            return _opened(path, "rwc" if create else "rw", create)
        except sqlite3.OperationalError as error:
            if not read_only or not _is(error, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise
            _refuse_unread_wal(path)
            return _opened(path, "ro&immutable=1", create=False)


class _Connection(sqlite3.Connection):
    """`still` is the state of a file that SQLite was told never changes; None of any other."""

    still: tuple[float, ...] | None = None


def is_stale(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether others wrote to a file that could not be written when this was opened, as they can:
    then it has to be opened again."""
    still = connection.still if isinstance(connection, _Connection) else None
    return still is not None and still != _state(path)


def in_memory() -> sqlite3.Connection:
    """A ledger in no file."""
    return _opened(Path("facts"), "memory", create=True)


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """All that is written inside is there, on disk, once this ends; after an exception, nothing.

    Raises:
        LedgerError: another process writes for longer than `BUSY_S`, the disk is full, or the file
            cannot be written.
    """
    with our_errors(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


@contextmanager
def our_errors(path: Path) -> Iterator[None]:
    """What SQLite says of the file, as a `LedgerError`."""
    try:
        yield
    except sqlite3.Error as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise LedgerError(f"{path} {reason}") from error


def _opened(path: Path, mode: str, create: bool) -> sqlite3.Connection:
    before = _state(path) if "immutable" in mode else None
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", timeout=BUSY_S, isolation_level=None, uri=True,
        factory=_Connection,
    )  # fmt: skip
    connection.still = before
    connection.text_factory = _text
    try:
        connection.execute("PRAGMA synchronous = FULL")
        if create:
            _begin(connection, path)
        _refuse_other(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _text(content: bytes) -> str | bytes:
    """What is no UTF-8 comes as it is: SQLite takes it for text, and no event is written so."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _begin(connection: sqlite3.Connection, path: Path) -> None:
    """Tables, where there is nothing yet: two processes may come here at once, or one may have been
    killed here before."""
    if not _is_bare(connection):
        return
    _set_wal(connection)
    with transaction(connection, path):
        if _is_bare(connection):
            for statement in _TABLES:
                connection.execute(statement)


def _set_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for another process here."""
    until_s = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _is(error, sqlite3.SQLITE_BUSY) or time.monotonic() > until_s:
                raise
            time.sleep(_RETRY_S)


def _is_bare(connection: sqlite3.Connection) -> bool:
    tables: int = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return not tables and not _pragma(connection, "application_id")


def _refuse_other(connection: sqlite3.Connection, path: Path) -> None:
    if _is_bare(connection):
        raise LedgerError(f'{path} holds nothing yet: `ullage memory add {path} "..."` begins it.')
    if _pragma(connection, "application_id") != _APPLICATION:
        raise LedgerError(f"{path} is a database, but no ledger of facts.")
    version = _pragma(connection, "user_version")
    if version != SCHEMA:
        raise LedgerError(
            f"{path} is a ledger of version {version}, and this ullage has version {SCHEMA}: use "
            "the ullage that wrote it to export its facts."
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    with closing(connection.execute(f"PRAGMA {name}")) as found:
        return int(found.fetchone()[0])


def _state(path: Path) -> tuple[float, ...]:
    """What tells that a file, or what is yet to be taken into it, was written to."""
    state: list[float] = []
    for file in (path, _wal(path)):
        with suppress(OSError):
            found = file.stat()
            state += found.st_ino, found.st_size, found.st_mtime_ns
    return tuple(state)


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _refuse_unread_wal(path: Path) -> None:
    wal = _wal(path)
    if wal.exists() and wal.stat().st_size:
        raise LedgerError(
            f"{path} cannot be written, and its last events are in {wal.name}, to be taken in "
            "first: copy both to where they can be."
        )


def _is(error: sqlite3.Error, *codes: int) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in codes  # the rest of it says more


def _reason(error: sqlite3.Error) -> str | None:
    """Why SQLite failed, after the name of the file; None where that is a bug of ours."""
    reasons = {
        sqlite3.SQLITE_BUSY: "is being written by another process, for longer than "
        f"{BUSY_S:g} s: try again.",
        sqlite3.SQLITE_READONLY: "cannot be written: it, or its folder, is read-only.",
        sqlite3.SQLITE_CANTOPEN: "cannot be opened: no such folder, or no permission.",
        sqlite3.SQLITE_PERM: "cannot be opened: no permission.",
        sqlite3.SQLITE_FULL: "cannot be written: the disk is full. Nothing of this is in it.",
        sqlite3.SQLITE_IOERR: f"cannot be read or written: {error}.",
        sqlite3.SQLITE_NOTADB: "is no ledger: it is not a database.",
        sqlite3.SQLITE_CORRUPT: f"is damaged ({error}): go back to a copy of it, or take out "
        "what can still be read with sqlite3's .recover.",
    }
    return next((text for code, text in reasons.items() if _is(error, code)), None)
