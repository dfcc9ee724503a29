"""Plans: made from a recipe, written as JSON, read back, and refused when damaged."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import (
    Device,
    Execution,
    InputError,
    ModelSpec,
    Plan,
    Recipe,
    TechniqueChoice,
    Workload,
    build_plan,
    default_execution,
    resolve,
)
from ullage.errors import TechniqueError
from ullage.planner import fit_run
from ullage.planner.search import Freedom
from ullage.specs.calibration import Calibration
from ullage.specs.families import RUNNING
from ullage.specs.plan import read_plan
from ullage.units import GIB, MIB

TinySpec = Callable[..., ModelSpec]
CPU = Device("cpu", "cpu", 64 * GIB)
INT8 = TechniqueChoice("quantization", {"scheme": "int8"})


def plan_of(spec: ModelSpec) -> Plan:
    return build_plan(Recipe(spec, CPU, Workload(100, 10, 3), Execution(), (INT8,)), 500 * MIB)


def test_the_default_budget_is_the_device(tiny_spec: TinySpec) -> None:
    recipe = Recipe(tiny_spec("llama"), CPU, Workload(100, 10), Execution())
    assert build_plan(recipe).budget_bytes == 64 * GIB


def test_the_peak_is_the_highest_phase(tiny_spec: TinySpec) -> None:
    plan = plan_of(tiny_spec("llama"))
    totals = {name: part.total_bytes for name, part in plan.phases.items()}
    assert plan.peak_bytes == max(totals.values())
    assert set(totals) == {"load", "prefill", "decode"}


def test_an_unsupported_technique_is_refused(tiny_spec: TinySpec) -> None:
    recipe = Recipe(tiny_spec("gpt2"), CPU, Workload(1, 1), Execution(), (INT8,))
    with pytest.raises(TechniqueError, match="quantization cannot act on tiny-gpt2"):
        build_plan(recipe)


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration("another", "ullage", {"runtime_bytes": 9}, {}),
        Calibration("cpu", "transformers", {"runtime_bytes": 9}, {}),
    ],
)
def test_a_calibration_of_another_device_or_engine_is_refused(
    tiny_spec: TinySpec, calibration: Calibration
) -> None:
    recipe = Recipe(tiny_spec("llama"), CPU, Workload(1, 1), Execution())
    with pytest.raises(InputError, match=r"The calibration is of .* and the plan of ullage on cpu"):
        build_plan(recipe, calibration=calibration)
    with pytest.raises(InputError, match="The calibration is of"):
        fit_run(recipe, GIB, Freedom(), calibration)


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "fp32"), ("cuda", "bf16"), ("mps", "bf16")])
def test_the_default_format_hangs_on_the_device(kind: Any, dtype: str) -> None:
    execution = default_execution(Device("some", kind, GIB))
    assert (execution.dtype, execution.kv_dtype) == (dtype, dtype)


@given(
    st.sampled_from([family for family in RUNNING if family != "gpt2"]),
    st.builds(Workload, st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 999)),
    st.builds(
        Execution,
        engine=st.sampled_from(["ullage", "transformers"]),
        dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
        prefill_chunk=st.integers(0, 4096),
    ),
    st.lists(st.sampled_from([INT8]), max_size=1).map(tuple),
    st.integers(1, 1 << 45),
)
def test_json_gives_the_same_plan_back(
    tiny_spec: TinySpec,
    family: str,
    work: Workload,
    execution: Execution,
    techniques: tuple[TechniqueChoice, ...],
    budget_bytes: int,
) -> None:
    plan = build_plan(Recipe(tiny_spec(family), CPU, work, execution, techniques), budget_bytes)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_json_says_the_figures_that_people_read(tiny_spec: TinySpec) -> None:
    plan = plan_of(tiny_spec("llama"))
    data = plan.to_json()
    assert data["fits"] is plan.fits
    assert data["peak_bytes"] == max(part["total_bytes"] for part in data["phases"].values())
    assert data["model"]["parameters"] == plan.recipe.model.parameters


@pytest.mark.parametrize(
    "path",
    [
        "budget_bytes", "latency", "kv_bytes_per_token", "techniques", "phases",
        "phases.decode", "cliff",
        "cliff.max_num_seqs", "device.kind", "device.memory_bytes", "workload.prompt_tokens",
        "execution", "model.caches", "model.tensors", "model.tensors.0.shape", "model.num_layers",
    ],
)  # fmt: skip
def test_a_plan_that_lacks_something_is_an_input_error(tiny_spec: TinySpec, path: str) -> None:
    data = json.loads(json.dumps(plan_of(tiny_spec("gemma2")).to_json()))
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    del place[last]
    with pytest.raises(InputError, match="damaged"):
        Plan.from_json(data)


@pytest.mark.parametrize("place", ["device", "workload", "execution", "cliff", "model"])
def test_a_plan_with_an_unknown_key_is_an_input_error(tiny_spec: TinySpec, place: str) -> None:
    data = plan_of(tiny_spec("llama")).to_json()
    data[place]["surprise"] = 1
    with pytest.raises(InputError, match="damaged"):
        Plan.from_json(data)


def test_a_plan_with_sizes_of_another_type_is_an_input_error(tiny_spec: TinySpec) -> None:
    data = plan_of(tiny_spec("llama")).to_json()
    for damaged in (
        {**data, "budget_bytes": "24GiB"},
        {**data, "workload": {**data["workload"], "prompt_tokens": "8"}},
        {**data, "workload": {**data["workload"], "sequences": 0}},
    ):
        with pytest.raises(InputError, match="damaged"):
            Plan.from_json(damaged)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("execution.dtype", "int8", "'int8' is no format"),
        ("execution.kv_dtype", "fp5", "'fp5' is no format"),
        ("execution.prefill_chunk", -5, "prefill_chunk is -5"),
        ("execution.engine", "vroom", "engine is one of ullage"),
        ("execution.attention", "psychic", "attention is one of eager"),
        ("execution.tensor_parallel", 0, "tensor_parallel is 0"),
        ("device.memory_bytes", 0, "memory_bytes is 0"),
        ("techniques.0.settings", 5, "settings is an object, not 5"),
        ("phases", 5, "phases is an object, not 5"),
        ("phases.load", None, "load is an object, not None"),
        ("model", [], "model is an object"),
        ("model.tensors.0.role", "villain", "role is one of"),
    ],
)
def test_a_value_that_there_is_not_is_named(
    tiny_spec: TinySpec, path: str, value: Any, says: str
) -> None:
    with pytest.raises(InputError, match=f"The plan is damaged: .*{says}"):
        Plan.from_json(changed(plan_of(tiny_spec("llama")).to_json(), path.split("."), value))


def changed(data: Any, path: list[str], value: Any) -> Any:
    """`data` as JSON gives it back, with the value at `path` replaced."""
    data = json.loads(json.dumps(data))
    place = data
    for key in path[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[path[-1]] = value
    return data


def paths(data: Any, so_far: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The way to every value in a tree of dicts."""
    if not isinstance(data, dict):
        return [so_far]
    return [path for key, value in data.items() for path in paths(value, (*so_far, key))]


@given(st.data())
def test_a_plan_with_anything_anywhere_is_a_plan_or_an_input_error(
    tiny_spec: TinySpec, data: st.DataObject
) -> None:
    plan = plan_of(tiny_spec("llama")).to_json()
    path = data.draw(st.sampled_from(paths(plan)))
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    value = data.draw(junk | st.lists(junk, max_size=2) | st.dictionaries(st.text(), junk))
    with suppress(InputError):
        assert isinstance(Plan.from_json(changed(plan, list(path), value)), Plan)


@pytest.mark.parametrize("data", [[], None, 3, "plan", {}, {"schema_version": 1}])
def test_what_is_no_plan_is_an_input_error(data: Any) -> None:
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 10**5, b"\xff\xfe\x00", b"[1, 2]", b'{"a": NaN}']
)
def test_a_file_that_is_no_plan_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(InputError):
        read_plan(file)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot read"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(InputError, match="Cannot read"):
        read_plan(tmp_path)


def test_a_written_plan_is_read_back(tmp_path: Path, tiny_spec: TinySpec) -> None:
    plan, file = plan_of(tiny_spec("gemma3_text")), tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()), encoding="utf-8")
    assert read_plan(file) == plan


def test_a_plan_names_kv_bytes_per_token() -> None:
    recipe = Recipe(resolve("llama-3.1-8b"), CPU, Workload(100, 10), Execution())
    assert build_plan(recipe).kv_bytes_per_token == 131_072


HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "torchao")
IMPORTS = {
    "import": "import ullage",
    "quantized plan": (
        "from ullage import *\n"
        "from ullage.techniques import parse, choice_of\n"
        "device = find_device('24GiB')\n"
        "recipe = Recipe(resolve('llama-3.1-8b'), device, Workload(4000, 100),\n"
        "    default_execution(device), (choice_of(parse('quantization:scheme=nf4')),))\n"
        "assert build_plan(recipe).fits"
    ),
    "command": (
        "import sys\n"
        "sys.argv = ['ullage', 'plan', 'smollm2-135m', '--device', 'h100']\n"
        "from ullage.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code"
    ),
}


@pytest.mark.parametrize("what", IMPORTS)
def test_planning_imports_no_torch(what: str) -> None:
    code = f"{IMPORTS[what]}\nimport sys\nassert not set({HEAVY}) & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
