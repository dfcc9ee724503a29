"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file, or what a link names, to be written in here; where it cannot be, or this is broken
    off, what was there before is still there.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write it, too
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` as `whole` does. What is no file, such as /dev/stdout, is written to as it
    stands.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with whole(path) as file:
        file.write(content)
