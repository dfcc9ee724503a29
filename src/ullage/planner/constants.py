"""The figures that no config holds, read from constants.toml beside this file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ullage.errors import InputError
from ullage.specs.calibration import Calibration
from ullage.specs.footprint import Label
from ullage.specs.plan import Recipe

_MINOR = 2  # numbers of a version that matter: patches hold what the minor version does
_MOST_DIGITS = 9  # of a number in a version; dates have eight


@dataclass(frozen=True)
class Constant:
    """A figure with its trustworthiness and its source."""

    value: float
    label: Label
    source: str


class Constants:
    """The constants of a recipe's engine, version and kind of device; a calibration's figures go
    before the built-in ones.

    Raises:
        InputError: the calibration is of another device or engine than the recipe, or the engine's
            version is none that there are figures of.
    """

    def __init__(self, recipe: Recipe, calibration: Calibration | None = None) -> None:
        execution = recipe.execution
        if calibration is not None:
            _refuse_other(calibration, recipe)
        kind = "cpu" if recipe.device.kind == "cpu" else "cuda"
        self._found = _constants(execution.engine, execution.engine_version, kind)
        self._measured = {} if calibration is None else calibration.constants
        self._device = "" if calibration is None else calibration.device

    def __contains__(self, key: str) -> bool:
        """Whether the engine has a constant called `key`."""
        return key in self._found

    def __getitem__(self, key: str) -> Constant:
        """The constant called `key`."""
        if key in self._measured:
            source = f"the calibration of {self._device}"
            return Constant(self._measured[key], "measured", source)
        return self._found[key]


def _refuse_other(calibration: Calibration, recipe: Recipe) -> None:
    measured = (calibration.engine, calibration.device)
    planned = (recipe.execution.engine, recipe.device.name)
    if calibration.engine != recipe.execution.engine or not calibration.is_of(recipe.device):
        raise InputError(
            f"The calibration is of {' on '.join(measured)}, and the plan of "
            f"{' on '.join(planned)}: measure that one, or leave --calibration out."
        )


def latency_constants(kind: str) -> Mapping[str, Constant]:
    """The constants of latency on a `kind` of device, the same for all engines."""
    return _constants("latency", "", "cpu" if kind == "cpu" else "cuda")


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(files(__package__).joinpath("constants.toml").read_text("utf-8"))


@cache
def _constants(engine: str, version: str, kind: str) -> Mapping[str, Constant]:
    if version:
        _refuse_unknown(engine, version)
    section = _table()[engine]
    merged = {**section.get("any", {}), **section.get(kind, {})}
    for since in sorted(section.get("since", {}), key=version_key):
        if not version or version_key(since) <= version_key(version):
            merged.update(section["since"][since])
    return {key: Constant(**entry) for key, entry in merged.items()}


def newest_version(engine: str) -> str:
    """The newest version of `engine` that there are figures of."""
    return str(_table()[engine]["versions"][1])


def _refuse_unknown(engine: str, version: str) -> None:
    key = version_key(version)
    oldest, newest = _table()[engine]["versions"]
    if not key:
        raise InputError(f"{version[:40]!r} is no version of {engine}, as {newest} is.")
    if not version_key(oldest) <= key[:_MINOR] <= version_key(newest)[:_MINOR]:
        raise InputError(
            f"{engine} {version[:40]} has no figures here: known are {oldest} to {newest}. Without "
            "--engine-version the newest is planned."
        )


def version_key(version: str) -> tuple[int, ...]:
    """What orders versions such as ``0.19.0`` or llama.cpp's ``b6000``: their leading numbers,
    none where it has none."""
    parts = []
    for part in version.lstrip("vb").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits or len(digits) > _MOST_DIGITS:
            break
        parts.append(int(digits))
    return tuple(parts)
