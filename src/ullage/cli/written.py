"""Files that a command writes at its end, refused before its work where they could not be."""

import os
from pathlib import Path

from ullage.errors import InputError
from ullage.specs.whole import write_whole


def refuse_unwritable(*files: Path) -> None:
    """
    Raises:
        InputError: a file that could not be written.
    """
    for file in files:
        folder = file.absolute().parent
        if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"Cannot write {file}: no such folder, or not a writable one.")


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
