"""The options of an engine, held against flags.toml: what its own parser knows."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ullage.errors import InputError
from ullage.planner.constants import version_key

Value = str | int | float


@dataclass(frozen=True)
class Option:
    """One option: its name as its engine spells it, its value (None: it stands alone) and why it is
    set."""

    name: str
    value: Value | None
    why: str


@dataclass(frozen=True)
class Known:
    """What one version of an engine knows: all names, and the values of those that take a few."""

    engine: str
    version: str
    names: frozenset[str]
    choices: Mapping[str, tuple[str, ...]]

    def choice(self, name: str, value: str) -> str:
        """`value`, if the option takes it.

        Raises:
            InputError: it does not.
        """
        if value not in self.choices[name]:
            raise InputError(
                f"{self.engine} {self.version} has no {name} {value!r}. "
                f"It has {', '.join(self.choices[name])}."
            )
        return value


@cache
def known(engine: str) -> Known:
    """The newest version of `engine` in flags.toml."""
    versions = _table()[engine]
    version = max(versions, key=version_key)
    entry = versions[version]
    choices = {name: tuple(values) for name, values in entry.get("choices", {}).items()}
    return Known(engine, version, frozenset(entry["flags"]), choices)


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(files("ullage.exporters").joinpath("flags.toml").read_text("utf-8"))
