import mmap
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ullage.errors import InputError
from ullage.runtime import process
from ullage.runtime.process import obtainable_bytes, reset_high_water, status_bytes
from ullage.units import MIB

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


def touched(mib: int) -> mmap.mmap:
    """Pages fresh from the system: an allocator may hand out what it holds of tests before."""
    data = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(data), mmap.PAGESIZE):
        data[at] = 1
    return data


@on_linux
def test_what_is_touched_is_anonymous() -> None:
    before = status_bytes()
    data = touched(64)
    after = status_bytes()
    assert before.anon_bytes is not None
    assert after.anon_bytes is not None
    assert after.anon_bytes - before.anon_bytes == pytest.approx(len(data), rel=0.05)
    assert after.high_water_bytes >= after.rss_bytes


@on_linux
def test_what_is_mapped_is_of_files(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(32 * MIB))
    before = status_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[:: mmap.PAGESIZE]) == 0
        after = status_bytes()
    assert before.file_bytes is not None
    assert after.file_bytes is not None
    assert after.file_bytes - before.file_bytes == pytest.approx(32 * MIB, rel=0.05)


@on_linux
def test_the_high_water_mark_starts_again() -> None:
    touched(128)
    risen_bytes = status_bytes().high_water_bytes
    if not reset_high_water():
        pytest.skip("the kernel does not let this user reset it")
    assert status_bytes().high_water_bytes <= risen_bytes - 100 * MIB


def test_another_process_is_seen() -> None:
    script = "b = bytearray(1 << 26); b[::4096] = b'x' * len(b[::4096]); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        held = status_bytes(child.pid)
        child.communicate()
    assert 64 * MIB <= held.rss_bytes <= 128 * MIB
    assert held.high_water_bytes >= held.rss_bytes


def test_a_process_that_is_not_there_is_our_error() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as child:
        child.wait()
    with pytest.raises(InputError, match=str(child.pid)):
        status_bytes(child.pid)


def test_off_linux_the_portable_figures_agree() -> None:
    portable = process._portable("self")
    assert portable.rss_bytes == pytest.approx(status_bytes().rss_bytes, rel=0.1)
    assert portable.high_water_bytes >= portable.rss_bytes
    assert process._portable(os.getpid()).anon_bytes is None


def test_where_the_mark_cannot_be_reset_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    assert reset_high_water() is False


def test_what_can_be_had_is_what_is_free_and_what_is_held() -> None:
    obtainable = obtainable_bytes()
    total_bytes = psutil.virtual_memory().total
    assert status_bytes().rss_bytes < obtainable < total_bytes


def test_memory_that_others_hold_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    held_bytes = status_bytes().rss_bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5))
    assert obtainable_bytes() == pytest.approx(held_bytes + 5, rel=0.1)
