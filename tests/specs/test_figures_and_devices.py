"""The catalogs of quality and of devices, and a calibration on disk: what no entry may break."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import resolve
from ullage.errors import InputError, UllageError
from ullage.specs import quality
from ullage.specs.calibration import Calibration, read_calibration
from ullage.specs.device import Device, _parse_nvidia_smi, catalog, find_device
from ullage.specs.quality import COMPARABLE, Metric, Quality, find
from ullage.units import GIB, MIB

BASE = Quality("weights", "int9", "m", 8 * 10**9, "perplexity %", 1.0, 10, "published", "a page")
LLAMA = resolve("llama-3.1-8b")  # 8.03 billion parameters


@pytest.mark.parametrize(
    ("metric", "change", "says", "cost"),
    [
        ("perplexity %", 1.5, "perplexity +1.5% on m, published", 1.5),
        ("task score %", 1.5, "task score -1.5% on m, published", 1.5),  # less score is worse
        ("task score %", 0.0, "task score +0% on m, published", 0.0),  # and nothing is not -0
        ("perplexity %", -0.4, "perplexity -0.4% on m, published", 0.0),
        ("mean KLD", 0.02, "mean KLD +0.02 on m, published", None),
        ("text similarity %", 3, "text similarity -3% on m, published", None),
        ("perplexity % against the window alone", 7.123456,
         "perplexity against the window alone +7.123% on m, published", None),
    ],
)  # fmt: skip
def test_a_figure_says_which_way_is_worse(
    metric: Metric, change: float, says: str, cost: float | None
) -> None:
    figure = replace(BASE, metric=metric, change=change)
    assert str(figure) == says
    assert figure.cost_percent == cost


def test_a_figure_of_no_one_model_names_none() -> None:
    assert str(replace(BASE, model="", parameters=None)) == "perplexity +1%, published"


# Each beats the one after it, for the reason beside it.
ORDER = [
    replace(BASE, model="llama-3.1-8b", parameters=10**9),  # the model itself
    replace(BASE, model="a", parameters=5 * 10**9, label="measured"),  # about its size, our own
    replace(BASE, model="b", parameters=9 * 10**9),  # about its size, the nearest
    replace(BASE, model="c", parameters=5 * 10**9),  # about its size: half to twice
    replace(BASE, model="d", parameters=3 * 10**9, label="measured"),  # 1.4 doublings away
    replace(BASE, model="e", parameters=70 * 10**9, label="measured"),  # 3.1 doublings away
    replace(BASE, model="", parameters=None, label="measured"),  # of who knows what
    replace(BASE, model="llama-3.1-8b", metric="mean KLD"),  # the model itself, not comparable
]


@given(st.permutations(ORDER), st.integers(1, len(ORDER)))
def test_the_nearest_figure_goes_first_in_whatever_order_they_are(
    rows: list[Quality], count: int
) -> None:
    some = rows[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "figures", lambda: tuple(some))
        assert find(LLAMA, "weights", "INT9") == min(some, key=ORDER.index)
        assert find(LLAMA, "weights", "int8") is find(LLAMA, "kv", "int9") is None


def test_what_is_comparable_is_a_percentage() -> None:
    assert all(metric.endswith("%") for metric in COMPARABLE)


def test_every_device_is_found_by_its_own_name() -> None:
    for name, device in catalog().items():
        assert find_device(name) == find_device(f"  NVIDIA {name.upper()} ") == device
        assert name == name.lower()


def test_every_device_is_possible() -> None:
    for device in catalog().values():
        assert GIB <= device.memory_bytes < 1024 * GIB
        # slower than a laptop or faster than anything built: a unit was mistaken
        assert device.bandwidth_bytes_s is None or 10e9 <= device.bandwidth_bytes_s <= 30e12
        assert device.bf16_flops is None or 1e11 <= device.bf16_flops <= 1e16
        if device.fp8_flops is not None:
            assert device.bf16_flops is not None
            assert 1 <= device.fp8_flops / device.bf16_flops <= 3
        assert device.source.split(":")[0] in ("measured", "derived", "assumed", "published")


def test_a_card_holds_less_than_it_says_on_the_box() -> None:
    """The driver keeps some, and GB are less than GiB; 24 GB cards report at most 24 GiB."""
    for name, device in catalog().items():
        boxed = [int(part[:-2]) for part in name.split("-") if part[:-2].isdigit() and
                 part.endswith("gb")]  # fmt: skip
        for size in boxed:
            assert 0.6 * size * GIB < device.memory_bytes <= size * GIB


@given(st.text(max_size=30))
def test_any_words_are_a_device_or_our_own_error(text: str) -> None:
    with suppress(UllageError):
        assert find_device(text).memory_bytes > 0


@pytest.mark.parametrize(
    ("answer", "memory_mib"),
    [
        ("NVIDIA L4, 23034, 540\n", 22_494),
        ("NVIDIA L4, 23034\n", 23_034),
        ("Some card, 1000, 1\nSome other, 2000, 2\n", 999),  # the first of several
    ],
)
def test_what_the_driver_keeps_is_not_the_devices(answer: str, memory_mib: int) -> None:
    found = _parse_nvidia_smi(answer)
    assert found.memory_bytes == memory_mib * MIB
    assert found.source == "measured: nvidia-smi"


def test_a_known_card_keeps_its_speed_and_an_unknown_one_has_none() -> None:
    known, unknown = map(_parse_nvidia_smi, ("NVIDIA L4, 23034, 540", "Riva 128, 4, 0"))
    assert known.bandwidth_bytes_s == catalog()["l4"].bandwidth_bytes_s
    assert unknown == Device("Riva 128", "cuda", 4 * MIB, source="measured: nvidia-smi")


names = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    names,
    st.dictionaries(names, st.integers(1, 1 << 50), min_size=1),
    st.dictionaries(names, names),
)
def test_any_calibration_that_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    device: str,
    constants: dict[str, int],
    versions: dict[str, str],
) -> None:
    file = tmp_path_factory.getbasetemp() / "any calibration.json"
    calibration = Calibration(device, "vllm", constants, versions)
    calibration.write(file)
    assert read_calibration(file) == calibration


MEASURED = Calibration("cpu", "ullage", {"runtime_bytes": 9}, {})


def test_a_calibration_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot write"):
        MEASURED.write(tmp_path / "no such folder" / "c.json")
    (tmp_path / "c.json").mkdir()  # the last step is what fails
    with pytest.raises(InputError, match="Cannot write"):
        MEASURED.write(tmp_path / "c.json")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_written_calibration_replaces_an_older_one(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    MEASURED.write(file)
    replace(MEASURED, constants={"runtime_bytes": 10}).write(file)
    assert read_calibration(file).constants == {"runtime_bytes": 10}
    assert os.listdir(tmp_path) == ["c.json"]
