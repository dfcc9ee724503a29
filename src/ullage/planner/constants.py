"""The figures that no config holds, read from constants.toml beside this file."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from ullage.specs.device import Device
from ullage.specs.workload import Engine


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("constants.toml").read_text("utf-8"))


def runtime_bytes(device: Device, engine: Engine) -> int:
    """Bytes that `engine` takes on `device` before any weight is there."""
    kind = "cpu" if device.kind == "cpu" else "cuda"
    return int(_table()[kind][engine]["runtime_bytes"]["value"])
