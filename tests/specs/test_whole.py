"""Files are there whole, or as they were."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ullage.specs.whole import whole, write_whole


def test_a_file_is_what_was_written(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for path, content in ((file, b"one"), (link, b"another")):
        write_whole(path, content)
        assert file.read_bytes() == content
    assert link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_whole(file, b"after")
    assert error.value.filename == str(file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_broken_off_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")

    def break_off() -> None:
        with whole(file) as opened:
            opened.write(b"af")
            raise error

    with pytest.raises(error):
        break_off()
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    """And what another is writing stays, or what only has such a name."""
    file = tmp_path / "file[1].json"
    script = """
import os, signal, sys
from pathlib import Path
from ullage.specs.whole import whole
with whole(Path(sys.argv[1])) as file:
    file.write(bytes(100_000))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(file)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = [
        tmp_path / name
        for name in (
            f"{file.name}.{os.getppid()}.part",
            f"{file.name}.old.part",
            f"{file.name}.{9**99}.part",
            "file1.json.part",
        )
    ]
    for other in others:
        other.touch()
    write_whole(file, b"content")
    assert not left.exists()
    assert sorted(tmp_path.iterdir()) == sorted([file, *others])


def test_what_another_machine_writes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are none that are known here."""
    file = tmp_path / "file"
    with whole(file) as opened:
        opened.write(b"its")
        (part,) = tmp_path.iterdir()
        with monkeypatch.context() as here:
            here.setattr("psutil.pid_exists", lambda process: False)
            here.setattr(os, "getpid", lambda: 1)
            write_whole(file, b"ours")
        assert sorted(tmp_path.iterdir()) == [file, part]
        assert file.read_bytes() == b"ours"
    assert file.read_bytes() == b"its"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path: Path) -> None:
    """And not by what is written in its place."""
    full, link, folder = tmp_path / "full", tmp_path / "link", tmp_path / "folder"
    full.symlink_to("/dev/full")
    link.symlink_to(tmp_path / "nowhere" / "file")
    folder.mkdir()
    for path in (full, link, folder, tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError, match=rf"'{path}'$"):
            write_whole(path, b"content")


def test_an_error_that_names_no_file_is_of_the_one_that_is_written(tmp_path: Path) -> None:
    """Whoever raised it."""
    with pytest.raises(OSError, match=r"No space left .*file'$"), whole(tmp_path / "file"):
        raise OSError(28, "No space left on device")


def test_an_error_of_another_file_names_that(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other'$"), whole(tmp_path / "file"):
        (tmp_path / "other").read_bytes()


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    """As /dev/stdout does."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"content")
    reader.join()
    assert read == [b"content"]
    assert pipe.is_fifo()
