"""Files that a command writes at its end, refused before its work where they could not be."""

import os
from contextlib import suppress
from pathlib import Path

from ullage.errors import InputError
from ullage.specs.whole import write_whole

_SQLITE = b"SQLite format 3\0"  # what its files begin with


def refuse_unwritable(*files: Path) -> None:
    """
    Raises:
        InputError: a file that could not be written, or a ledger of facts, which is not what
            anybody means to lose.
    """
    for file in files:
        if _is_database(file):
            raise InputError(f"{file} is a database, as a ledger of facts is: name another file.")
        folder = file.absolute().parent
        if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"Cannot write {file}: no such folder, or not a writable one.")


def _is_database(file: Path) -> bool:
    if not file.is_file():
        return False
    with suppress(OSError), file.open("rb") as content:
        return content.read(len(_SQLITE)) == _SQLITE
    return False


def refuse_undrawable(plot: Path) -> None:
    """
    Raises:
        InputError: a picture for `--plot` of a format that is not drawn, or that could not be
            written.
    """
    if plot.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"--plot {plot}: the picture is .svg or .png.")
    refuse_unwritable(plot)


def write_text(file: Path, text: str) -> None:
    """Write it whole, or not at all.

    Raises:
        InputError: it could not be written.
    """
    try:
        write_whole(file, text.encode())
    except OSError as error:
        raise InputError(f"Cannot write {file}: {error.strerror}.") from error
