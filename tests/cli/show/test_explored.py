"""What a search found: its table and JSON, its picture, the advice; and the catalogs."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ullage import InputError, Recipe, Workload, find_device, resolve
from ullage.cli.show import catalogs
from ullage.cli.show.explored import candidate_json, change_line, size_line
from ullage.planner import default_execution
from ullage.planner.explore import cheapest_change, explore
from ullage.planner.search import Freedom
from ullage.specs.calibration import Calibration
from ullage.specs.device import catalog
from ullage.specs.plan import Cliff, read_plan
from ullage.units import GIB, format_bytes

Typed = Callable[..., subprocess.CompletedProcess[str]]
CARD = find_device("rtx-4090")
PLAN = ["plan", "llama-3.1-8b", "--device", "rtx-4090", "--max-model-len", "8192"]


def asked(tokens: int = 7936, output: int = 256) -> Recipe:
    model, work = resolve("llama-3.1-8b"), Workload(tokens, output)
    return Recipe(model, CARD, work, default_execution(CARD))


@pytest.mark.parametrize("goal", ["context", "concurrency", "latency"])
def test_the_json_is_what_the_search_found(typed: Typed, goal: str) -> None:
    found = json.loads(typed(*PLAN, "--goal", goal, "--json").stdout)
    explored = explore(asked(), None, goal, Freedom())  # type: ignore[arg-type]
    assert (found["goal"], found["tried"]) == (goal, len(explored.every))
    assert found["fitting"] == len(explored.ranked)
    assert found["asked"] == json.loads(json.dumps(candidate_json(explored.every[0])))
    assert [row["changes"] for row in found["ranked"]] == [
        list(candidate.changes) for candidate in explored.best(10)
    ]
    assert len(found["front"]) == len(explored.front)
    assert all((row["reach"] is None) == (goal == "latency") for row in found["ranked"])


@pytest.mark.parametrize("goal", ["context", "concurrency", "latency"])
def test_the_best_is_a_plan_at_the_size_that_it_reaches(
    typed: Typed, tmp_path: Path, goal: str
) -> None:
    done = typed(*PLAN, "--goal", goal, "--explain", "--json")
    found, file = json.loads(done.stdout), tmp_path / "found.json"
    file.write_text(done.stdout)
    plan, first = read_plan(file), found["ranked"][0]
    work = plan.recipe.workload
    reached = {"context": work.context_tokens, "concurrency": work.sequences, "latency": None}
    assert plan.fits
    assert reached[goal] == first["reach"]
    assert plan.budget_bytes == first["budget_bytes"]
    for phase in ("prefill", "decode"):
        lines = found["best"]["explain"][phase]
        assert sum(line["nbytes"] for line in lines) == plan.phases[phase].total_bytes  # type: ignore[index]


def test_a_search_explains_its_best(typed: Typed) -> None:
    done = typed(*PLAN, "--goal", "context", "--explain")
    assert done.returncode == 0
    assert re.search(r"The first, at 1 x [\d,]+ tokens: \w+ weights", done.stdout)
    assert "CUDA context with cuBLAS" in done.stdout
    assert "The first, at" not in typed(*PLAN, "--goal", "context").stdout


def test_the_best_of_other_devices_is_explained_without_a_calibration(
    typed: Typed, tmp_path: Path
) -> None:
    file = tmp_path / "calibration.json"
    Calibration("rtx-4060", "ullage", {"runtime_bytes": 7}, {}).write(file)
    words = ["plan", "llama-3.1-70b", "--device", "rtx-4060", "--also-device", "h200"]
    done = typed(*words, "--goal", "latency", "--explain", "--calibration", str(file))
    assert done.returncode == 0, done.stderr
    assert "CUDA context with cuBLAS" in done.stdout


def test_a_search_without_a_fit_holds_no_plan(typed: Typed, tmp_path: Path) -> None:
    done = typed("plan", "llama-3.1-70b", "--device", "rtx-4060", "--goal", "latency", "--json")
    file = tmp_path / "found.json"
    file.write_text(done.stdout)
    assert json.loads(done.stdout)["best"] is None
    with pytest.raises(InputError, match="nothing fits, so there is no plan"):
        read_plan(file)


@pytest.mark.parametrize(
    ("goal", "column"), [("context", "context"), ("concurrency", "sequences"), ("latency", None)]
)
def test_the_table_has_the_ranking_and_the_front(
    typed: Typed, goal: str, column: str | None
) -> None:
    done = typed(*PLAN, "--goal", goal)
    assert done.returncode == 0
    explored = explore(asked(), None, goal, Freedom())  # type: ignore[arg-type]
    first, front = done.stdout.split("Nothing beats these in memory, quality and latency at once:")
    assert f"for {goal}: {len(explored.ranked)} of {len(explored.every)} combinations" in first
    header = first.splitlines()[1]
    assert (column in header) if column else (header.split()[0] == "memory")
    rows = [line for line in first.splitlines() if re.match(r"\d+ ", line)]
    best = explored.best(10)
    assert len(rows) == len(best)
    for row, candidate in zip(rows, best, strict=True):
        assert format_bytes(candidate.peak_bytes) in row
        assert candidate.reach is None or f" {candidate.reach:,} " in row
        assert row.rstrip().endswith("*") is not candidate.runs
        assert ("as asked" in row) is (not candidate.changes)
    listed = [line for line in front.splitlines() if re.match(r"\d+ ", line)]
    peaks = [format_bytes(found.peak_bytes) for found in explored.shown_front(10)]
    assert [" ".join(line.split()[1:3]) for line in listed] == peaks
    assert "Losses are added up, and rest on:" in front


@pytest.mark.parametrize("goal", ["context", "concurrency", "latency"])
def test_the_tables_of_a_search_keep_to_eighty_columns(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, goal: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = typed(*PLAN, "--goal", goal).stdout.split("Losses are added up")[0]
    rows = [line for line in said.splitlines() if re.match(r"\d+ ", line)]
    assert max(map(len, rows)) <= 80
    assert "…" not in said
    assert "TTFT" in said
    more = [line for line in said.splitlines() if line.startswith(" " * 20)]
    assert len(more) < len(rows)  # folded once at most, and seldom


@pytest.mark.parametrize("what", ["--list-devices", "--list-models"])
def test_a_narrow_catalog_has_a_line_an_entry(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    count = len(json.loads(typed("plan", what, "--json").stdout))
    assert typed("plan", what).stdout.splitlines()[0].rstrip().endswith("from")
    monkeypatch.setenv("COLUMNS", "80")
    assert len(typed("plan", what).stdout.splitlines()) == count + 1


def test_a_loss_that_is_not_known_is_said(typed: Typed) -> None:
    words = [*PLAN, "--engine", "llama.cpp", "--goal", "latency", "--kv-cache-dtype", "iq4_nl"]
    shown = typed(*words).stdout
    assert re.search(r" [\d.]+% \+ \?  ", shown)
    assert "? no figure that can be compared" in shown
    row = json.loads(typed(*words, "--json").stdout)["ranked"][0]
    assert row["cost_percent"] is None
    assert row["known_percent"] <= 5


def test_each_change_is_said_in_few_words(typed: Typed) -> None:
    words = [*PLAN, "--engine", "vllm", "--goal", "concurrency", "--also-device", "h100"]
    explored = typed(*words, "--memory", "12GiB").stdout
    assert "--" not in explored.split("Losses are added up, and rest on:")[0].replace(
        "--memory", ""
    )
    assert re.search(r"\d devices|fp8 KV|fp8 weights", explored)


def test_a_search_offers_no_weights_that_the_engine_makes_of_no_plain_checkpoint(
    typed: Typed,
) -> None:
    words = ["plan", "qwen3-14b", "--device", "h100", "--engine", "vllm"]
    explored = typed(*words, "--goal", "concurrency").stdout
    assert "int4 weights," not in explored
    assert re.search(r"Left out: int8, int4, .*weights, which vllm makes of no plain", explored)
    small = typed(*words, "--memory", "4GiB").stdout
    assert "Left out: int8, int4" in small
    assert "Left out" not in typed(*words, "--goal", "context", "--weights", "int4").stdout


def test_a_search_for_context_starts_small_unless_told(typed: Typed) -> None:
    short = ["plan", "llama-3.1-8b", "--device", "rtx-4090", "--goal", "context"]
    assert "1 x 8,192 tokens" in typed(*short).stdout
    assert (
        "1 x 2,048 tokens" in typed("plan", "gpt2-xl", *short[2:], "--max-model-len", "2K").stdout
    )
    assert "1 x 1,024 tokens" in typed("plan", "gpt2-xl", *short[2:]).stdout  # all that it has


def test_a_search_for_concurrency_takes_the_asked_number_as_the_least(typed: Typed) -> None:
    words = [*PLAN, "--engine", "vllm", "--goal", "concurrency", "--max-num-seqs", "4", "--json"]
    found = json.loads(typed(*words, "--weights", "int4").stdout)
    assert found["ranked"][0]["reach"] > 4


def test_another_device_comes_after_all_that_is_there(typed: Typed) -> None:
    words = [*PLAN, "--goal", "latency", "--also-device", "h100", "--json"]
    ranked = json.loads(typed(*words).stdout)["ranked"]
    hardware = [row["hardware"] for row in ranked]
    assert hardware == sorted(hardware)
    small = ["--weights", "bf16", "--kv-cache-dtype", "bf16", "--prefill-chunk", "512"]
    done = typed("plan", "llama-2-13b", *words[2:], *small, "--technique", "dms")
    (only,) = json.loads(done.stdout)["ranked"]
    assert only["changes"] == ["--device h100-80gb"]
    assert only["budget_bytes"] == find_device("h100").memory_bytes


def test_advice_beside_a_search_knows_the_calibration(typed: Typed, tmp_path: Path) -> None:
    """5 GiB of runtime leave less of the context than the built-in figure does."""
    file = tmp_path / "calibration.json"
    Calibration("rtx-4090", "ullage", {"runtime_bytes": 5 * GIB}, {}).write(file)
    words = [*PLAN[:-1], "100000", "--calibration", str(file)]
    (plan, search) = (typed(*words, *more).stdout for more in ([], ["--goal", "latency"]))
    (size,) = re.findall(r"Or .* tokens instead of 100,000\.", plan)
    assert size in search


@pytest.mark.parametrize(
    ("ending", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG\r\n"), ("SVG", b"<?xml")]
)
def test_a_picture_is_in_the_format_of_its_ending(
    typed: Typed, tmp_path: Path, ending: str, begins: bytes
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"a picture.{ending}"
    assert typed(*PLAN, "--goal", "latency", "--plot", str(file)).returncode == 0
    assert file.read_bytes().startswith(begins)


def test_a_picture_names_what_it_shows(typed: Typed, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    file = tmp_path / "search.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        typed(*PLAN, "--goal", "latency", "--memory", "12GiB", "--plot", str(file))
    texts = {text.strip() for text in ElementTree.parse(file).getroot().itertext()}
    assert "llama-3.1-8b on rtx-4090, 1 x 8,192" in texts
    assert {"fits", "does not fit", "front", "sweet spot", "cliff: the budget"} <= texts
    assert {"peak, GiB", "loss of quality, %, added up", "tokens a second, all sequences"} <= texts


def test_a_search_without_latency_or_a_fit_is_drawn_too(typed: Typed, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "search.png"
    words = ["plan", "llama-3.1-70b", "--device", "4GiB", "--goal", "latency", "--plot", str(file)]
    done = typed(*words)
    assert done.returncode == 1
    assert "0 of " in done.stdout
    assert "the smallest budget that works is --memory" in done.stdout
    assert file.stat().st_size > 5000


def test_a_change_is_said_with_its_cost() -> None:
    single = cheapest_change(asked(100_000), None, Freedom())
    assert change_line(single).startswith(
        "Cheapest single change that fits: --kv-cache-dtype int8: "
    )
    assert str(single.change_costs[0]) in change_line(single)
    assert not change_line(single).endswith("Planned only.")
    several = cheapest_change(asked(100_000), 8 * GIB, Freedom())
    assert change_line(several).startswith("No single change is enough; these are: --weights nf4 ")
    planned_only = replace(several, runs=False)
    assert change_line(planned_only).endswith("Planned only.")


@pytest.mark.parametrize(
    ("cliff", "says"),
    [
        (Cliff(5000, 9), "Or 5,000 tokens instead of 8,192."),
        (Cliff(521_088, 9), "Or 131,072 tokens instead of 8,192."),  # all that it has
        (Cliff(256, 9), "Or 9 at a time instead of 1."),  # room for the output alone is none
        (Cliff(0, 9), "Or 9 at a time instead of 1."),
        (Cliff(0, 0), None),
    ],
)
def test_the_size_that_fits_is_a_length_or_else_a_number(cliff: Cliff, says: str | None) -> None:
    assert size_line(cliff, asked()) == says


def test_the_catalog_of_devices_has_every_device(typed: Typed) -> None:
    rows = catalogs.devices()
    assert [row["name"] for row in rows] == list(catalog())
    assert json.loads(typed("plan", "--list-devices", "--json").stdout) == rows
    table = typed("plan", "--list-devices").stdout
    (h100,) = [line for line in table.splitlines() if line.startswith("h100-80gb")]
    # 85,029,027,840 B; 3.35 TB/s; 989 Tflop/s in bf16 and 1,979 in fp8
    assert h100.split()[1:7] == ["cuda", "79.19", "GiB", "3,350", "989", "1,979"]
    (laptop,) = [line for line in table.splitlines() if line.startswith("cpu-16gb")]
    assert laptop.split()[4:6] == ["40", "0.4"]  # and no fp8


def test_the_catalog_of_models_has_what_a_plan_would_say(typed: Typed) -> None:
    rows = {row["name"]: row for row in json.loads(typed("plan", "--list-models", "--json").stdout)}
    # 8,030,261,248 parameters; 2 x 8 heads x 128 numbers x 2 B x 32 layers
    assert rows["llama-3.1-8b"]["parameters"] == 8_030_261_248
    assert rows["llama-3.1-8b"]["kv_bytes_per_token"] == 131_072
    assert all(row["active_parameters"] <= row["parameters"] for row in rows.values())
    (line,) = [
        line for line in typed("plan", "--list-models").stdout.splitlines()
        if line.startswith("llama-3.1-8b ")
    ]  # fmt: skip
    assert line.split()[1:6] == ["8.03B", "8.03B", "131,072", "128.0", "KiB"]


def test_a_catalog_is_all_that_is_listed(typed: Typed) -> None:
    """Whatever else is asked; models where both are."""
    both = typed("plan", "gpt2", "--list-models", "--list-devices", "--json", "--goal", "latency")
    assert both.returncode == 0
    assert "family" in json.loads(both.stdout)[0]
