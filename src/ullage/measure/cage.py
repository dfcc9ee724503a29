"""Run processes under a hard memory cap, to see what lives and what dies."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from ullage.errors import InputError, SizeError, UllageError

Mechanism = Literal["memory cgroup v1", "memory cgroup v2", "RLIMIT_DATA"]
MECHANISMS: tuple[Mechanism, ...] = ("memory cgroup v1", "memory cgroup v2", "RLIMIT_DATA")

_REMOVE_TRIES, _REMOVE_PAUSE_S = 250, 0.02  # five seconds for the last process to go


@dataclass(frozen=True)
class CageReport:
    """What the kernel saw of a cage.

    `peak_bytes` is the cgroup's own count, page cache and kernel memory included; None where
    nothing counts. `out_of_memory` is, with a cgroup, whether the kernel killed for memory; with
    RLIMIT_DATA, where allocations are refused instead, whether a process ended with any code but 0.
    """

    mechanism: Mechanism
    limit_bytes: int
    peak_bytes: int | None
    out_of_memory: bool


class Cage:
    """A context in which processes share `limit_bytes` of memory and no swap.

    With a cgroup every page counts, also those of files that the processes read first; the kernel
    drops file pages before it kills. RLIMIT_DATA holds each process by itself and counts what it
    has asked for rather than touched, and no file pages. Whatever still runs inside is killed at
    the end, and the cgroup removed.

        with Cage(1 << 30) as cage:
            cage.popen(["python", "train.py"]).wait()
        print(cage.report())

    Raises:
        SizeError: the limit is not positive.
        InputError: this machine does not have the mechanism that was asked for.
    """

    def __init__(self, limit_bytes: int, mechanism: Mechanism | None = None) -> None:
        if limit_bytes <= 0:
            raise SizeError(f"A memory cap of {limit_bytes} bytes leaves nothing to run in.")
        self.limit_bytes = limit_bytes
        self._wanted = MECHANISMS if mechanism is None else (mechanism,)
        self._processes: list[subprocess.Popen[Any]] = []
        self._final: CageReport | None = None

    def __enter__(self) -> Self:
        opened = (_open(mechanism, self.limit_bytes) for mechanism in self._wanted)
        bars = next((bars for bars in opened if bars is not None), None)
        if bars is None:
            raise InputError(f"This machine cannot cap memory by {' or '.join(self._wanted)}.")
        self._bars = bars
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for process in self._processes:
                process.kill()  # does nothing to one that has been waited for
                process.wait()
            self._final = self.report()
        finally:
            self._bars.remove()

    @property
    def mechanism(self) -> Mechanism:
        """What holds the limit here."""
        return self._bars.mechanism

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `command` inside, from its first instruction; `options` are those of
        `subprocess.Popen`. A command that does not exist ends with code 127."""
        process: subprocess.Popen[Any] = subprocess.Popen([*self._bars.entry, *command], **options)
        self._processes.append(process)
        return process

    def report(self) -> CageReport:
        """What was seen up to now or, after the end, in all."""
        if self._final is not None:
            return self._final
        codes = [process.returncode for process in self._processes]
        return CageReport(
            self.mechanism, self.limit_bytes, self._bars.peak_bytes(), self._bars.ran_out(codes)
        )


def available() -> list[Mechanism]:
    """The mechanisms that work on this machine for this user, best first."""
    found = []
    for mechanism in MECHANISMS:
        bars = _open(mechanism, 1 << 30)
        if bars is not None:
            bars.remove()
            found.append(mechanism)
    return found


class _Bars(Protocol):
    """What holds a limit: `entry` goes before the command that is to be inside."""

    @property
    def mechanism(self) -> Mechanism: ...
    @property
    def entry(self) -> list[str]: ...
    def peak_bytes(self) -> int | None: ...
    def ran_out(self, codes: Sequence[int | None]) -> bool: ...
    def remove(self) -> None: ...


def _open(mechanism: Mechanism, limit_bytes: int) -> _Bars | None:
    if mechanism == "RLIMIT_DATA":
        return _DataLimit(limit_bytes) if os.name == "posix" else None
    files = _V1 if mechanism == _V1.mechanism else _V2
    for parent in _parents(files):
        group = _make_group(files, parent, limit_bytes)
        if group is not None:
            return group
    return None


@dataclass(frozen=True)
class _DataLimit:
    limit_bytes: int
    mechanism: Mechanism = "RLIMIT_DATA"

    @property
    def entry(self) -> list[str]:
        limit_kib = max(1, self.limit_bytes // 1024)
        return ["/bin/sh", "-c", f'ulimit -d {limit_kib} && exec "$@"', "sh"]

    def peak_bytes(self) -> None:
        return None

    def ran_out(self, codes: Sequence[int | None]) -> bool:
        return any(codes)

    def remove(self) -> None:
        pass


@dataclass(frozen=True)
class _Files:
    """What a version of cgroups calls the files used here."""

    mechanism: Mechanism
    filesystem: str
    limit: str
    swap: str
    peak: str
    events: str


_V1 = _Files(
    mechanism="memory cgroup v1",
    filesystem="cgroup",
    limit="memory.limit_in_bytes",
    swap="memory.memsw.limit_in_bytes",  # memory and swap together
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
)
_V2 = _Files(
    mechanism="memory cgroup v2",
    filesystem="cgroup2",
    limit="memory.max",
    swap="memory.swap.max",
    peak="memory.peak",
    events="memory.events",
)


@dataclass(frozen=True)
class _Group:
    files: _Files
    folder: Path

    @property
    def mechanism(self) -> Mechanism:
        return self.files.mechanism

    @property
    def entry(self) -> list[str]:
        # The shell moves itself, then becomes the command: no instruction of it runs outside.
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs")]

    def set_limit(self, limit_bytes: int) -> None:
        (self.folder / self.files.limit).write_text(str(limit_bytes))
        swap = self.folder / self.files.swap
        if swap.exists():  # not where the kernel does not count swap
            swap.write_text(str(limit_bytes if self.files is _V1 else 0))

    def peak_bytes(self) -> int | None:
        try:
            return int((self.folder / self.files.peak).read_text())
        except OSError:  # memory.peak came with Linux 5.19
            return None

    def ran_out(self, codes: Sequence[int | None]) -> bool:
        lines = (self.folder / self.files.events).read_text().splitlines()
        return any(line.startswith("oom_kill ") and line != "oom_kill 0" for line in lines)

    def remove(self) -> None:
        for _ in range(_REMOVE_TRIES):
            try:
                return self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # something still runs inside
                self._kill_all()
                time.sleep(_REMOVE_PAUSE_S)
        raise UllageError(f"A process inside {self.folder} does not die; remove it by hand.")

    def _kill_all(self) -> None:
        for pid in (self.folder / "cgroup.procs").read_text().split():
            if int(pid) > 0:  # 0 stands for a process that is not visible from here
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def _make_group(files: _Files, parent: Path, limit_bytes: int) -> _Group | None:
    try:
        group = _Group(files, Path(tempfile.mkdtemp(prefix="ullage-", dir=parent)))
    except OSError:
        return None
    try:
        group.set_limit(limit_bytes)
        entered = subprocess.run([*group.entry, "true"], stderr=subprocess.DEVNULL, check=False)
        if entered.returncode == 0:
            return group
    except OSError:
        pass
    except BaseException:
        group.remove()
        raise
    group.remove()
    return None


def _parents(files: _Files) -> Iterator[Path]:
    """Where a group can be made: this process's own cgroup, else above it. In version 2 a cgroup
    that holds processes cannot hand memory on to a child, so that it is usually one above."""
    mount = _mount(files)
    if mount is None:
        return
    own = mount / _own_path(files).lstrip("/")
    for folder in (own, *own.parents):
        if _hands_on_memory(files, folder):
            yield folder
        if folder == mount:
            return


def _hands_on_memory(files: _Files, folder: Path) -> bool:
    if files is _V1:
        return (folder / files.limit).exists()
    try:
        return "memory" in (folder / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


def _mount(files: _Files) -> Path | None:
    for line in _lines("/proc/self/mountinfo"):
        where, _, what = line.partition(" - ")
        filesystem, _, options = what.split(maxsplit=2)
        if filesystem == files.filesystem and (files is _V2 or "memory" in options.split(",")):
            return Path(where.split()[4])
    return None


def _own_path(files: _Files) -> str:
    wanted = "memory" if files is _V1 else ""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if wanted in controllers.split(","):
            return path
    return "/"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
