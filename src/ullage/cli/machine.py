"""The device that run and audit run on: one that torch can use."""

import sys
from importlib.util import find_spec

from ullage.errors import InputError
from ullage.specs.device import Device, DeviceKind, find_device

NEEDS_RUN = "is not installed: pip install 'ullage[run]'"


def device_to_run(named: str | None) -> Device:
    """The device called `named`. None is this machine: its CPU, said on stderr, where torch cannot
    use its GPU.

    Raises:
        InputError: torch is not installed, or cannot use the device that was named.
    """
    device = find_device(named)
    if named is not None:
        refuse_unusable(device)
        return device
    problem = _problem(device.kind)
    if problem is None:
        return device
    print(f"{problem}: {device.name} is left alone, and the CPU runs.", file=sys.stderr)
    return find_device("cpu")


def refuse_unusable(device: Device) -> None:
    """
    Raises:
        InputError: torch is not installed, or cannot use `device`.
    """
    problem = _problem(device.kind)
    if problem is not None:
        raise InputError(f"{device.name} cannot run here. {problem}; --device cpu will do.")


def _problem(kind: DeviceKind) -> str | None:
    """Why torch cannot use a device of this kind, or None."""
    if find_spec("torch") is None:
        raise InputError(f"torch {NEEDS_RUN}")
    if kind == "cpu":
        return None
    import torch

    usable = torch.backends.mps.is_available() if kind == "mps" else torch.cuda.is_available()
    name = {"cuda": "CUDA", "rocm": "ROCm", "mps": "Apple GPU"}[kind]
    return None if usable else f"This torch ({torch.__version__}) finds no {name} device"
