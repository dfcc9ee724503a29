"""Files that are written whole or not at all."""

import glob
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file, or what a link names, to be written in here; where it cannot be, or this is broken
    off, what was there before is still there. What a process that was killed left of the same
    file is taken away.

    Raises:
        OSError: it cannot be written; names `path`. So does one that was raised in here and names
            no file, as those of writing do not.
    """
    target = path.resolve()
    _clear(target)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")  # others may write it, too
    try:
        with _naming(path, part), part.open("wb") as file:
            with suppress(OSError):  # not on every file system
                _hold(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # what is open is not moved there
            part.replace(target)  # while it is held
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` as `whole` does. What is no file, such as /dev/stdout, is written to as it
    stands.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    if path.exists() and not path.is_file():
        with _naming(path, path):
            path.write_bytes(content)
        return
    with whole(path) as file:
        file.write(content)


def _clear(target: Path) -> None:
    """Take away the parts of `target` whose process is no more; none where nothing can be held."""
    import psutil

    for part in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        process = part.name[len(target.name) + 1 : -len(".part")]
        with suppress(OSError, OverflowError):  # above what a process can have
            if process.isdecimal() and not psutil.pid_exists(int(process)):
                with part.open("r+b") as file:
                    _hold(file)  # another machine's process may be writing it
                    part.unlink()


def _hold(file: BinaryIO) -> None:
    """Let no other process hold it while it is open.

    Raises:
        OSError: another holds it, or nothing can be held here.
    """
    if sys.platform == "win32":
        raise OSError("nothing is held on Windows, which has no fcntl")
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _naming(path: Path, written: Path) -> Iterator[None]:
    """An error of writing names `path`: of a full disk the system names no file, of any other the
    one that is `written` in its place."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(written)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
