"""Calibration: what was measured on this machine, for the planner to use instead of its built-in
constants. `ullage audit` measures ullage's own, `ullage doctor --learn` reads an engine's log."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ullage.errors import InputError
from ullage.specs.workload import Engine


@dataclass(frozen=True)
class Calibration:
    """`constants` are bytes by the names that planner/constants.toml has for `engine`, such as
    ``runtime_bytes``: what ullage's process takes beside weights, KV entries and activations."""

    device: str
    engine: Engine
    constants: dict[str, int]
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the calibration, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"Cannot write {path}: {error.strerror}.") from error


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file that `ullage audit` or `ullage doctor --learn` wrote.

    Raises:
        InputError: no such file, or not a calibration.
    """
    try:
        calibration = Calibration(**json.loads(path.read_text(encoding="utf-8")))
        figures = list(calibration.constants.values())
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no calibration file: `ullage audit` writes one.") from error
    if not figures or not all(isinstance(figure, int) and figure > 0 for figure in figures):
        raise InputError(f"{path} holds no usable figures: write it again.")
    return calibration
