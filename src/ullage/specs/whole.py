"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or what a link names; where it cannot be, what was there before is still there.
    What is no file, such as /dev/stdout, is written to as it stands.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write it, too
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
