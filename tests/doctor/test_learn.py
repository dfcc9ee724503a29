"""From a healthy start to a calibration."""

from dataclasses import replace
from pathlib import Path

import pytest

from ullage.doctor.diagnosis import Diagnosis, Run
from ullage.doctor.learn import learn
from ullage.errors import InputError
from ullage.specs.calibration import read_calibration
from ullage.specs.device import Device, find_device
from ullage.specs.footprint import Term
from ullage.units import GIB

OUTSIDE = Term("overhead", "context and libraries", GIB // 4, "measured", "line 3 of the log")
HEALTHY = Diagnosis("", False, "vllm", "0.19.0", parts=(OUTSIDE,), device="h100-80gb")


def test_what_the_log_measured_is_written_and_read_back(tmp_path: Path) -> None:
    calibration = learn(HEALTHY)
    assert calibration.constants == {"non_torch_bytes": GIB // 4}
    assert (calibration.engine, calibration.versions) == ("vllm", {"vllm": "0.19.0"})
    assert calibration.device == "h100-80gb"
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


def test_the_device_is_the_one_that_is_named_or_the_logs() -> None:
    assert learn(HEALTHY, "NVIDIA A100-SXM4-80GB").device == "a100-80gb"
    assert learn(HEALTHY, "79GiB").device == "79GiB"
    with pytest.raises(InputError, match="--device"):
        learn(replace(HEALTHY, device=""))
    with pytest.raises(InputError, match="No device"):
        learn(HEALTHY, "")


# llm-d-planner, v0.19.0: codellama-7b on an H100. INFO has no line of the profile, of the context
# or of the device; with DEBUG the same start says 0.77 and 0.25 GiB.
MEASURED = {"weights": 12.56, "CUDA graphs": 0.86, "KV pool": 61.65}
INFO = Diagnosis(
    "", False, "vllm", "0.19.0",
    parts=tuple(
        Term("overhead", what, round(size * GIB), "measured", "") for what, size in MEASURED.items()
    ),
    run=Run("codellama/CodeLlama-7b-hf", max_model_len=8192, utilization=0.95),
)  # fmt: skip


def test_a_start_without_debug_gives_what_its_pool_leaves() -> None:
    constants = learn(INFO, "h100").constants
    assert set(constants) == {"non_torch_bytes", "graph_bytes"}
    assert constants["non_torch_bytes"] == pytest.approx(0.25 * GIB, abs=0.05 * GIB)


def test_without_a_plan_a_pool_tells_nothing() -> None:
    with pytest.raises(InputError, match="models of the catalog"):
        learn(replace(INFO, run=Run("someone/unknown")), "h100")


def test_a_calibration_is_of_every_spelling_of_its_device_and_of_no_other() -> None:
    found = learn(HEALTHY)
    assert found.is_of(find_device("h100"))
    assert found.is_of(Device("NVIDIA H100 80GB HBM3", "cuda", 79 * GIB))  # as nvidia-smi has it
    assert not found.is_of(find_device("h100-pcie"))
    assert not found.is_of(Device("NVIDIA Unheard Of", "cuda", 79 * GIB))
    unknown = replace(found, device="79GiB")
    assert unknown.is_of(find_device("79GiB"))
    assert not unknown.is_of(find_device("80GiB"))
