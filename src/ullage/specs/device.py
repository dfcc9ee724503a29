"""Device: where a model runs, with its physical bytes."""

import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ullage.errors import UnknownDevice
from ullage.units import MIB, parse_bytes

DeviceKind = Literal["cpu", "cuda", "rocm", "mps"]

# Drivers before 2022 do not know `memory.reserved`.
_NVIDIA_SMI_FIELDS = ("name,memory.total,memory.reserved", "name,memory.total")
_NVIDIA_SMI_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Device:
    """A place that holds a model. `memory_bytes` is what the driver or kernel reports, not the
    number on the box (an "80 GB" H100 has 79.19 GiB).

    `bandwidth_bytes_s` is that of its memory. `bf16_flops` is the dense rate of bf16 matrices that
    sum in fp32, in operations a second: fp16's where there is no bf16, fp32's on CPUs. `fp8_flops`
    is None where there is no such arithmetic, and any of the three where it is not known."""

    name: str
    kind: DeviceKind
    memory_bytes: int
    bandwidth_bytes_s: int | None = None
    bf16_flops: int | None = None
    fp8_flops: int | None = None
    source: str = ""


def find_device(text: str | None) -> Device:
    """The device that `text` names: one of the catalog (``h100``, ``a100-40gb``, ``rtx-4090``), or
    a bare size (``24GiB``) of some CUDA device. None is this machine: its first NVIDIA GPU, else
    its CPU with as much RAM as this process may use; ``cpu`` is the latter.

    Raises:
        UnknownDevice: no such name in the catalog.
        SizeError: it starts as a size does, but is none.
    """
    if text is None:
        return _nvidia_gpu() or _cpu()
    if text.strip().lower() == "cpu":
        return _cpu()
    device = _names().get(_plain(text))
    if device is not None:
        return device
    if text.strip()[:1] in tuple("0123456789-+."):
        size_bytes = parse_bytes(text)
        return Device(name=text.strip(), kind="cuda", memory_bytes=size_bytes, source="as given")
    close = difflib.get_close_matches(_plain(text[:100]), _names(), n=3)
    meant = ", ".join(dict.fromkeys(_names()[name].name for name in close))
    hint = f" Did you mean {meant}?" if meant else " `ullage plan --list-devices` shows it."
    raise UnknownDevice(
        f"No device {text[:100]!r} in the catalog.{hint} A size, as 24GiB, will do."
    )


def catalog_name(text: str) -> str:
    """The catalog's name of the device that `text` spells, as a driver or a person does; "" of
    others."""
    known = _names().get(_plain(text))
    return known.name if known else ""


@cache
def catalog() -> Mapping[str, Device]:
    """The devices that are known by name."""
    return {
        name: Device(name, **{key: value for key, value in entry.items() if key != "aliases"})
        for name, entry in _entries().items()
    }


@cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    text = (Path(__file__).parent / "catalog" / "devices.json").read_text("utf-8")
    entries: Mapping[str, Mapping[str, Any]] = json.loads(text)
    return entries


@cache
def _names() -> Mapping[str, Device]:
    """Every spelling of every device."""
    return {
        _plain(spelling): catalog()[name]
        for name, entry in _entries().items()
        for spelling in (name, *entry.get("aliases", ()))
    }


def _plain(text: str) -> str:
    """`text` without case, blanks, hyphens and the makers' names."""
    return re.sub(r"[^a-z0-9.]|nvidia|geforce|amd|apple", "", text.lower())


def _nvidia_gpu() -> Device | None:
    """The first GPU that CUDA would show to this process, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    for fields in _NVIDIA_SMI_FIELDS:
        command = ("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
        try:
            answer = subprocess.run(
                (*command, f"--id={visible}"),
                capture_output=True,
                text=True,
                timeout=_NVIDIA_SMI_TIMEOUT_S,
                check=True,
            )
            return _parse_nvidia_smi(answer.stdout)
        except subprocess.CalledProcessError:
            continue
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
    return None


def _parse_nvidia_smi(answer: str) -> Device:
    """The device in a line such as ``NVIDIA L4, 23034, 540`` (MiB). Raises ValueError for others.

    The total counts all that is soldered on; the driver keeps the reserved part for itself, and
    CUDA never shows it.
    """
    name, total_mib, *reserved_mib = (field.strip() for field in answer.split("\n")[0].split(","))
    memory_bytes = (int(total_mib) - sum(map(int, reserved_mib))) * MIB
    if memory_bytes <= 0:
        raise ValueError(answer)
    known = _names().get(_plain(name)) or Device(name, "cuda", memory_bytes)
    return replace(known, name=name, memory_bytes=memory_bytes, source="measured: nvidia-smi")


def _cpu() -> Device:
    import psutil

    limits = [psutil.virtual_memory().total, *_cgroup_limits(Path("/"))]
    return Device("cpu", "cpu", min(limits), source="measured: RAM, and the cgroup's limit")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Memory limits in bytes of this process's control groups, version 1 and 2, and of all their
    parents. In a container the group's own path may not be there; the root is the group then."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits_up(root / "sys/fs/cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_up(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")


def _limits_up(mount: Path, group: str, file_name: str) -> Iterator[int]:
    folder = mount / group.strip("/")
    for place in (folder, *folder.parents):
        try:
            text = (place / file_name).read_text().strip()
        except OSError:
            text = "max"
        if text.isdecimal() and int(text) > 0:
            yield int(text)
        if place == mount:
            return
