import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ullage.errors import InputError, SizeError
from ullage.measure import cage as cages
from ullage.measure.cage import MECHANISMS, Cage, Mechanism
from ullage.units import MIB

CAP_BYTES = 100 * MIB
AVAILABLE = cages.available()
CGROUPS = [mechanism for mechanism in MECHANISMS if mechanism in AVAILABLE[:-1]]


def allocate(mib: int) -> list[str]:
    # bytearray asks for zeroed pages; the writes make them real
    fill = f"b = bytearray({mib} << 20); b[::4096] = b'x' * len(b[::4096])"
    return [sys.executable, "-S", "-c", fill]


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    if request.param not in AVAILABLE:
        pytest.skip(f"no {request.param} for this user on this machine")
    return request.param


@pytest.fixture
def cgroup() -> Mechanism:
    if not CGROUPS:
        pytest.skip("no memory cgroup for this user on this machine")
    return CGROUPS[0]


def test_too_much_dies(mechanism: Mechanism) -> None:
    with Cage(CAP_BYTES, mechanism) as cage:
        code = cage.popen(allocate(300), stderr=subprocess.DEVNULL).wait()
    assert code == (1 if mechanism == "RLIMIT_DATA" else -signal.SIGKILL)
    assert cage.report().out_of_memory
    assert cage.report().mechanism == mechanism


def test_less_than_the_cap_lives(mechanism: Mechanism) -> None:
    with Cage(CAP_BYTES, mechanism) as cage:
        assert cage.popen(allocate(50)).wait() == 0
    assert not cage.report().out_of_memory


def test_the_peak_is_what_was_touched(cgroup: Mechanism) -> None:
    with Cage(CAP_BYTES, cgroup) as cage:
        cage.popen(allocate(50)).wait()
    peak_bytes = cage.report().peak_bytes
    assert peak_bytes is not None
    assert 50 * MIB <= peak_bytes <= CAP_BYTES


def test_the_peak_never_passes_the_cap(cgroup: Mechanism) -> None:
    with Cage(CAP_BYTES, cgroup) as cage:
        cage.popen(allocate(300)).wait()
    peak_bytes = cage.report().peak_bytes
    assert peak_bytes is not None
    assert 0.9 * CAP_BYTES <= peak_bytes <= CAP_BYTES


def test_the_limit_holds_all_processes_together(cgroup: Mechanism) -> None:
    with Cage(CAP_BYTES, cgroup) as cage:
        fill = allocate(70)[-1] + "; print(flush=True); input()"
        first = cage.popen(
            [sys.executable, "-S", "-c", fill], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert first.stdout is not None
        first.stdout.readline()
        cage.popen(allocate(70)).wait()
        assert cage.report().out_of_memory
        first.communicate()


def test_the_child_is_inside_from_the_start(cgroup: Mechanism) -> None:
    with Cage(CAP_BYTES, cgroup) as cage:
        command = ["cat", "/proc/self/cgroup"]
        shown = cage.popen(command, stdout=subprocess.PIPE, text=True).communicate()[0]
        assert folder(cage).name in shown
    assert not folder(cage).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_nothing_behind(
    mechanism: Mechanism, error: type[BaseException]
) -> None:
    cage = Cage(CAP_BYTES, mechanism)
    with pytest.raises(error):
        break_off(cage, error)
    assert cage._processes[0].poll() == -signal.SIGKILL
    if mechanism != "RLIMIT_DATA":
        assert not folder(cage).exists()


def break_off(cage: Cage, error: type[BaseException]) -> None:
    with cage:
        cage.popen(["sleep", "60"])
        raise error


def test_grandchildren_are_killed_too(cgroup: Mechanism) -> None:
    with Cage(CAP_BYTES, cgroup) as cage:
        script = "sleep 60 >/dev/null & echo $!"
        shell = cage.popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
        pid = int(shell.communicate()[0])
        os.kill(pid, 0)
    assert not folder(cage).exists()


def test_two_cages_at_once_do_not_share(mechanism: Mechanism) -> None:
    with Cage(CAP_BYTES, mechanism) as small, Cage(4 * CAP_BYTES, mechanism) as large:
        assert small.popen(allocate(200), stderr=subprocess.DEVNULL).wait() != 0
        assert large.popen(allocate(200)).wait() == 0
    assert small.report().out_of_memory
    assert not large.report().out_of_memory


def test_without_cgroups_it_falls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cages, "_lines", lambda path: [])
    with Cage(CAP_BYTES) as cage:
        assert cage.popen(allocate(20)).wait() == 0
    assert cage.report().mechanism == "RLIMIT_DATA"
    assert cage.report().peak_bytes is None


def test_a_read_only_cgroup_falls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with Cage(CAP_BYTES) as cage:
        assert cage.mechanism == "RLIMIT_DATA"


def test_a_cgroup_that_cannot_be_limited_is_removed(
    cgroup: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def refuse(group: cages._Group, limit_bytes: int) -> None:
        made.append(group.folder)
        raise PermissionError

    monkeypatch.setattr(cages._Group, "set_limit", refuse)
    with Cage(CAP_BYTES) as cage:
        assert cage.mechanism == "RLIMIT_DATA"
    assert made
    assert not any(path.exists() for path in made)


def test_a_mechanism_that_is_not_there_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cages, "_lines", lambda path: [])
    with pytest.raises(InputError, match="memory cgroup v2"), Cage(CAP_BYTES, "memory cgroup v2"):
        pass


@pytest.mark.parametrize("limit_bytes", [0, -1])
def test_a_cap_of_nothing_is_our_error(limit_bytes: int) -> None:
    with pytest.raises(SizeError):
        Cage(limit_bytes)


V1_CGROUP = ["9:name=systemd:/", "4:memory:/job/7", "0::/"]
V1_MOUNTS = [
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
]


def test_where_this_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"/proc/self/cgroup": V1_CGROUP, "/proc/self/mountinfo": V1_MOUNTS}
    monkeypatch.setattr(cages, "_lines", tables.__getitem__)
    assert cages._mount(cages._V1) == Path("/sys/fs/cgroup/memory")
    assert cages._own_path(cages._V1) == "/job/7"
    assert cages._mount(cages._V2) == Path("/sys/fs/cgroup/unified")
    assert cages._own_path(cages._V2) == "/"


def test_version_two_looks_above_its_own_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "user.slice" / "term.scope"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    monkeypatch.setattr(cages, "_mount", lambda files: tmp_path)
    monkeypatch.setattr(cages, "_own_path", lambda files: "/user.slice/term.scope")
    assert list(cages._parents(cages._V2)) == [own.parent]


def folder(cage: Cage) -> Path:
    bars = cage._bars
    assert isinstance(bars, cages._Group)
    return bars.folder
