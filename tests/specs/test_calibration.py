"""A calibration file is read whole or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from ullage.errors import InputError
from ullage.specs.calibration import Calibration, read_calibration

GOOD: dict[str, Any] = {
    "device": "cpu", "engine": "ullage", "constants": {"runtime_bytes": 9},
    "versions": {"torch": "2"},
}  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    calibration = Calibration(**GOOD)
    calibration.write(tmp_path / "calibration.json")
    assert read_calibration(tmp_path / "calibration.json") == calibration


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "7", "[" * 10**5,
        *(
            json.dumps(GOOD | changes)
            for changes in (
                {"constants": {"runtime_bytes": "9"}},
                {"constants": {"runtime_bytes": -9}},
                {"constants": {"runtime_bytes": 0}},
                {"constants": {"runtime_bytes": True}},
                {"constants": {}},
                {"constants": 5},
                {"engine": "vroom"},
                {"device": None},
                {"surprise": 1},
            )
        ),
        json.dumps({"device": "cpu"}),
    ],
)  # fmt: skip
def test_what_is_no_calibration_is_an_input_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"calibration\.json") as caught:
        read_calibration(file)
    assert "\n" not in str(caught.value)
