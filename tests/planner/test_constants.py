"""The figures that no config holds: which of them counts, and that each says where it is from."""

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import (
    Device,
    Execution,
    InputError,
    Recipe,
    Workload,
    __version__,
    build_plan,
    resolve,
)
from ullage.planner.build import default_execution
from ullage.planner.constants import Constants, latency_constants, newest_version, version_key
from ullage.planner.engines import ENGINES
from ullage.specs.calibration import Calibration
from ullage.specs.footprint import Label
from ullage.specs.workload import Engine
from ullage.units import GIB

CARD, CPU = Device("card", "cuda", 80 * GIB), Device("cpu", "cpu", 64 * GIB)
TABLE = tomllib.loads(files("ullage.planner").joinpath("constants.toml").read_text("utf-8"))


def recipe(engine: Engine = "vllm", version: str = "", device: Device = CARD) -> Recipe:
    execution = Execution(engine=engine, engine_version=version)
    return Recipe(resolve("smollm2-135m"), device, Workload(100, 10), execution)


def entries(table: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in table.items():
        if key == "versions":
            continue
        if "value" in value:
            yield f"{place}.{key}", value
        else:
            yield from entries(value, f"{place}.{key}")


def test_every_figure_has_a_label_and_a_source() -> None:
    found = dict(entries(TABLE))
    assert len(found) > 50
    for place, entry in found.items():
        assert set(entry) == {"value", "label", "source"}, place
        assert entry["label"] in get_args(Label), place
        assert entry["value"] >= 0, place
        assert len(entry["source"]) > 8, place


def test_a_later_version_changes_only_what_there_was() -> None:
    for version, changes in TABLE["vllm"]["since"].items():
        assert set(changes) <= set(TABLE["vllm"]["any"]), version


@pytest.mark.parametrize(
    ("version", "utilization", "number_bytes", "graphs"),
    [
        ("0.16.9", 0.9, 36, 0),
        ("0.17", 0.9, 12, 0),
        ("v0.19.1", 0.9, 12, 0),
        ("0.20.0rc1", 0.92, 12, 1),
        ("0.9.2", 0.9, 36, 0),  # numbers, not text: before 0.16
        ("", 0.92, 12, 1),
    ],
)
def test_the_newest_figures_that_are_not_after_the_version_count(
    version: str, utilization: float, number_bytes: int, graphs: int
) -> None:
    constants = Constants(recipe(version=version))
    assert constants["utilization"].value == utilization
    assert constants["sampler_number_bytes"].value == number_bytes
    assert constants["graphs_in_budget"].value == graphs


def test_kinds_of_devices_have_figures_of_their_own() -> None:
    assert Constants(recipe("ullage", device=CPU))["margin_bytes"].value == 0
    for kind in ("cuda", "rocm", "mps"):
        other = Device("some", kind, GIB)  # type: ignore[arg-type]
        assert Constants(recipe("ullage", device=other))["margin_bytes"].value == 64 << 20
    assert latency_constants("cpu")["launch_s"].value == 0
    assert latency_constants("rocm")["launch_s"].value == 0.0006


def test_a_band_lies_around_its_figure() -> None:
    for kind in ("cpu", "cuda"):
        found = latency_constants(kind)
        for key in ("bandwidth_share", "rate_share"):
            low, middle, high = (found[key + end].value for end in ("_low", "", "_high"))
            assert 0 < low < middle < high <= 1
        slow, usual, fast = (found["launch_s" + end].value for end in ("_low", "", "_high"))
        assert slow >= usual >= fast  # the low end of a rate is the long time


def test_what_is_measured_goes_before_what_is_built_in() -> None:
    measured = Calibration("card", "vllm", {"non_torch_bytes": 7}, {})
    constants = Constants(recipe(), measured)
    assert constants["non_torch_bytes"].value == 7
    assert constants["non_torch_bytes"].label == "measured"
    assert "the calibration of card" in constants["non_torch_bytes"].source
    assert constants["utilization"] == Constants(recipe())["utilization"]


def test_a_constant_is_the_engines_own() -> None:
    assert "utilization" in Constants(recipe("vllm"))
    assert "utilization" not in Constants(recipe("ullage"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("other", ["device", "engine"])
def test_a_calibration_of_something_else_is_refused(engine: Engine, other: str) -> None:
    asked = Recipe(
        resolve("smollm2-135m"), CARD, Workload(100, 10), default_execution(CARD, engine)
    )
    another: Engine = "vllm" if engine == "ullage" else "ullage"
    measured = Calibration(
        "another card" if other == "device" else "card",
        another if other == "engine" else engine,
        {"runtime_bytes": 1},
        {},
    )
    with pytest.raises(InputError, match=r"The calibration is of .*leave --calibration out"):
        build_plan(asked, calibration=measured)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("version", ["banana", "...", "-1", "1" * 5000, "\0", "³"])
def test_what_is_no_version_is_refused(engine: Engine, version: str) -> None:
    with pytest.raises(InputError, match=f"is no version of {engine}") as refused:
        Constants(recipe(engine, version))
    assert len(str(refused.value)) < 150


@pytest.mark.parametrize(
    ("engine", "known", "unknown"),
    [
        ("ullage", [__version__], ["0.0.9", "99"]),
        ("transformers", ["5.20.1", "5.24.7"], ["4.57.6", "5.25", "6.0"]),
        ("vllm", ["0.7.0", "0.33.4", "v0.20.1rc1"], ["0.6.6", "0.1.dev19262", "0.34.0", "1", "99"]),
        ("sglang", ["0.5.10rc0", "0.5.99"], ["0.4.6", "0.6", "99"]),
        ("llama.cpp", ["b6123", "11434"], ["b1", "b11435"]),
    ],
)
def test_a_version_without_figures_is_refused(
    engine: Engine, known: list[str], unknown: list[str]
) -> None:
    for version in known:
        assert Constants(recipe(engine, version))
    for version in unknown:
        with pytest.raises(InputError, match=rf"known are .* to {newest_version(engine)}\."):
            Constants(recipe(engine, version))


numbers = st.lists(st.integers(0, 10**8), min_size=1, max_size=4)


@given(numbers, numbers)
def test_versions_are_ordered_by_their_numbers(one: list[int], other: list[int]) -> None:
    first, second = (".".join(map(str, parts)) for parts in (one, other))
    assert (version_key(first) < version_key(second)) == (one < other)
    assert version_key(f"v{first}") == version_key(first + ".dev3") == tuple(one)


def test_a_build_of_llama_cpp_is_a_version() -> None:
    assert version_key("b6123") == (6123,)
    assert version_key("0.19.0rc2+cu128") == (0, 19, 0)
