"""A device by name, by size, or the machine itself."""

import stat
from pathlib import Path

import psutil
import pytest

from ullage.errors import SizeError, UnknownDevice
from ullage.specs import device
from ullage.specs.device import Device, find_device
from ullage.units import GIB, MIB


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "h100-80gb"),
        ("H100-80GB", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("a100-40gb", "a100-40gb"),
        ("A100 40 GB", "a100-40gb"),
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3060", "rtx-3060-12gb"),
        ("mi300x", "mi300x"),
        ("M3 Max", "m3-max-128gb"),
        ("cpu-16gb", "cpu-16gb"),
    ],
)
def test_natural_spellings(text: str, name: str) -> None:
    assert find_device(text).name == name


def test_a_size_is_a_device_of_that_size() -> None:
    assert find_device(" 24GiB ") == Device("24GiB", "cuda", 24 * GIB, source="as given")
    assert find_device("900MiB").memory_bytes == 900 * MIB


@pytest.mark.parametrize(
    "text", ["-1GiB", "12parsecs", "0", "0GiB", "80%", "1e3", "+4GiB", ".5GiB"]
)
def test_a_bad_size_is_a_size_error(text: str) -> None:
    with pytest.raises(SizeError):
        find_device(text)


@pytest.mark.parametrize("text", ["h300", "", " ", "tpu", "\0", "a" * 5000, "/h100x", "é"])
def test_an_unknown_name(text: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        find_device(text)
    assert len(str(caught.value)) < 300


def test_a_slip_of_the_pen_is_answered_with_a_name() -> None:
    with pytest.raises(UnknownDevice, match="Did you mean rtx-4090"):
        find_device("rtx-4900")


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_gpu_is_what_the_driver_lends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA GeForce RTX 4090, 24564, 347'")
    found = find_device(None)
    assert (found.name, found.kind) == ("NVIDIA GeForce RTX 4090", "cuda")
    assert found.memory_bytes == (24564 - 347) * MIB
    known = find_device("rtx-4090")
    assert (found.bandwidth_bytes_s, found.bf16_flops) == (
        known.bandwidth_bytes_s,
        known.bf16_flops,
    )


def test_an_old_driver_reports_the_total_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'case "$1" in *reserved*) exit 2;; esac; echo "Tesla K80, 11441"'
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    assert find_device(None).memory_bytes == 11441 * MIB


def test_the_gpu_is_the_one_that_cuda_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, 'echo "card ${3#--id=}, 1000, 0"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert find_device(None).name == "card 2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device(None).kind == "cpu"


@pytest.mark.parametrize(
    "script",
    ["exit 9", "echo 'NVIDIA GB10, [N/A], [N/A]'", "echo", "echo 'x, 5, 7'", "echo No devices", ""],
)
def test_a_driver_that_says_nothing_leaves_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    assert find_device(None).kind == "cpu"


def test_a_driver_that_hangs_leaves_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(device, "_NVIDIA_SMI_TIMEOUT_S", 0.2)
    assert find_device(None).kind == "cpu"


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = find_device(None)
    assert found.kind == "cpu"
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total


def cgroup(root: Path, line: str, limits: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line)
    for name, text in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "4096\n"}, [4096]),
        ("0::/gone\n", {"memory.max": "8192\n"}, [8192]),
        ("0::/\n", {"memory.max": "nonsense"}, []),
        (
            "5:cpu,memory:/a\n1:cpu:/\n",
            {"memory/a/memory.limit_in_bytes": "77\n", "memory/memory.limit_in_bytes": "99\n"},
            [77, 99],
        ),
    ],
    ids=["v2 of a parent", "v2 in a container", "v2 unlimited", "v1"],
)
def test_cgroup_limits(
    tmp_path: Path, line: str, limits: dict[str, str], expected: list[int]
) -> None:
    assert list(device._cgroup_limits(cgroup(tmp_path, line, limits))) == expected


def test_no_cgroups_no_limit(tmp_path: Path) -> None:
    assert list(device._cgroup_limits(tmp_path)) == []
