"""Calibration: what was measured on this machine, for the planner to use instead of its built-in
constants. `ullage audit` measures ullage's own, `ullage doctor --learn` reads an engine's log."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ullage.errors import InputError
from ullage.specs.decode import decode
from ullage.specs.device import Device, catalog_name
from ullage.specs.whole import write_whole
from ullage.specs.workload import Engine


@dataclass(frozen=True)
class Calibration:
    """`constants` are bytes by the names that planner/constants.toml has for `engine`, such as
    ``runtime_bytes``: what ullage's process takes beside weights, KV entries and activations."""

    device: str
    engine: Engine
    constants: dict[str, int]
    versions: dict[str, str]

    def is_of(self, device: Device) -> bool:
        """Whether it was measured on `device`, however either is spelled."""
        known = catalog_name(self.device)
        return self.device == device.name or (known != "" and known == catalog_name(device.name))

    def write(self, path: Path) -> None:
        """Write the calibration, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            write_whole(path, (json.dumps(asdict(self), indent=2) + "\n").encode())
        except OSError as error:
            raise InputError(f"Cannot write {path}: {error.strerror}.") from error


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file that `ullage audit` or `ullage doctor --learn` wrote.

    Raises:
        InputError: no such file, or not a calibration.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        calibration: Calibration = decode(Calibration, data, "calibration")
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError, InputError) as error:
        reason = f" {error}" if isinstance(error, InputError) else ""
        raise InputError(
            f"{path} is no calibration file: `ullage audit` and `ullage doctor --learn` write "
            f"them.{reason}"
        ) from error
    if not calibration.constants or 0 in calibration.constants.values():
        raise InputError(f"{path} holds no usable figures: write it again.")
    return calibration
