"""Calibration: what `ullage audit` measured on this machine, for the planner to use instead of its
built-in constants."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ullage.errors import InputError


@dataclass(frozen=True)
class Calibration:
    """`runtime_bytes` is what the process takes beside weights, KV entries and activations:
    interpreter, libraries, tokenizer, thread scratch."""

    device: str
    runtime_bytes: int
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
    """The calibration in a file that `ullage audit` wrote.

    Raises:
        InputError: no such file, or not a calibration.
    """
    try:
        calibration = Calibration(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no calibration file: `ullage audit` writes one.") from error
    if calibration.runtime_bytes <= 0:
        raise InputError(f"{path} holds no usable figures: run `ullage audit` again.")
    return calibration
