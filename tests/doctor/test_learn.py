"""From a healthy start to a calibration."""

from dataclasses import replace
from pathlib import Path

import pytest

from ullage.doctor.diagnosis import Diagnosis, Run
from ullage.doctor.learn import learn
from ullage.errors import InputError
from ullage.specs.calibration import read_calibration
from ullage.specs.footprint import Term
from ullage.units import GIB

OUTSIDE = Term("overhead", "context and libraries", GIB // 4, "measured", "line 3 of the log")
HEALTHY = Diagnosis("", False, "vllm", "0.19.0", parts=(OUTSIDE,), total_bytes=79 * GIB)


def test_what_the_log_measured_is_written_and_read_back(tmp_path: Path) -> None:
    calibration = learn(HEALTHY)
    assert calibration.constants == {"non_torch_bytes": GIB // 4}
    assert (calibration.engine, calibration.versions) == ("vllm", {"vllm": "0.19.0"})
    assert calibration.device == "79.00 GiB device"
    calibration.write(tmp_path / "file.json")
    assert read_calibration(tmp_path / "file.json") == calibration


def test_several_devices_have_a_figure_of_their_own() -> None:
    split = learn(replace(HEALTHY, run=Run(tensor_parallel=2)))
    assert set(split.constants) == {"non_torch_tp_bytes", "non_torch_tp_slow_bytes"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"failed": True}, "shows a failure"),
        ({"engine": "ollama"}, "no such engine"),
        ({"parts": ()}, "no figure"),
        ({"run": Run(pipeline_parallel=2)}, "no figure"),
    ],
)
def test_nothing_is_learned_of_what_is_no_use(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        learn(replace(HEALTHY, **changes))  # type: ignore[arg-type]
