"""Plans against what real engines measured of themselves, one line a case.

python benchmarks/planner_accuracy.py --data DIR    # DIR holds ground_truth.csv

Each case is a start of vLLM or SGLang whose log was published, or a dry run of llama.cpp. Only the
model's name, its formats, the device and the flags go into a plan; every figure of a case is
compared with the plan's. A case that cannot be planned is listed with the reason; of one
whose flags are not stated only the tokens in its pool are compared.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import cast

from ullage.errors import UllageError
from ullage.planner import build_plan
from ullage.planner.constants import Constants
from ullage.planner.engines import ENGINES
from ullage.planner.engines.shards import stages
from ullage.planner.engines.vllm import stage_terms
from ullage.specs.device import Device, find_device
from ullage.specs.dtypes import dtype_name, kv_dtype_name
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan, Recipe
from ullage.specs.sources import catalog, resolve
from ullage.specs.workload import Engine, Workload
from ullage.units import GIB

GUARD_GIB = 0.6
# What a published name adds to that of the model whose tensors it has.
_TUNED = r"(?i)[-_](instruct|chat|it|pt|hf|base|geometry|\d{4})(?=[-_.]|$)|^meta-"
_FORMATS = {
    "w8a8": "int8", "fp8": "fp8", "w4a16": "int4", "nvfp4": "nvfp4", "mxfp4": "mxfp4",
}  # fmt: skip
_FORMAT = re.compile(r"(?i)[-_.](quantized\.)?(w8a8|w4a16|nvfp4|fp8(-dynamic)?)$")


class Unplanned(Exception):
    """Why a case cannot be planned."""


@dataclass
class Case:
    """The rows of one start: its settings, and what was measured, in GiB or tokens."""

    row: Mapping[str, str]
    notes: str = ""
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def states_flags(self) -> bool:
        """Whether it is known what share of the device the engine was told to take."""
        return "util" in self.notes or "mem-fraction" in self.notes

    @property
    def title(self) -> str:
        """Engine, version, model and flags that tell it from others."""
        row = self.row
        parts = [row["engine"], row["engine_version"], row["model"], row["weight_dtype"],
                 f"kv {row['kv_dtype']}", row["context_or_max_model_len"], f"tp {row['tp']}",
                 self.setting(r"\bpp=(\d+)", "pp "), row["gpu"]]  # fmt: skip
        return " ".join(part for part in parts if part)

    def setting(self, pattern: str, prefix: str = "") -> str:
        """The first group of `pattern` in the notes, "" if it is not there."""
        found = re.search(pattern, self.notes)
        return prefix + found[1] if found else ""


@dataclass(frozen=True)
class Line:
    """A case's planned figures beside the measured: both in GiB or tokens."""

    case: Case
    planned: Mapping[str, float]

    def error(self, quantity: str) -> float | None:
        """Planned minus measured, None where one is missing."""
        if quantity not in self.planned or quantity not in self.case.measured:
            return None
        return self.planned[quantity] - self.case.measured[quantity]

    def relative(self, quantity: str) -> float | None:
        """The error as a part of the measured figure."""
        error = self.error(quantity)
        return None if error is None else error / self.case.measured[quantity]


def read_cases(path: Path) -> list[Case]:
    """The cases of a table, in its order."""
    cases: dict[tuple[str, ...], Case] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            case = cases.setdefault(_key(row), Case(row))
            case.notes += ";" + row["notes"]
            case.measured[row["quantity"]] = float(row["value_gib_or_tokens"])
    return list(cases.values())


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    found = re.search(r"case_id=(\S+)|flags ([^;]+)", row["notes"])
    same = ("engine", "engine_version", "model", "weight_dtype", "kv_dtype", "gpu", "tp", "url",
            "context_or_max_model_len", "batch_or_num_seqs")  # fmt: skip
    return (found[0] if found else "", *(row[name] for name in same))


def model_of(case: Case) -> tuple[ModelSpec, str]:
    """The model, and the format that its checkpoint is taken to have ("" for its own)."""
    name = case.row["model"]
    try:
        return resolve(name), ""
    except UllageError:
        pass
    found = _FORMAT.search(name)
    plain = _plain(_FORMAT.sub("", name))
    for entry, facts in catalog().items():
        if plain in (_plain(entry), _plain(str(facts.get("hub", "")))):
            return resolve(entry), found[2].lower().split("-")[0] if found else ""
    raise Unplanned("the model is not in the catalog")


def _plain(name: str) -> str:
    """A model's name without its organisation, tuning and date."""
    last = name.strip().split("/")[-1]
    while (shorter := re.sub(_TUNED, "", last.replace(" ", "-"))) != last:
        last = shorter
    return last.lower()


def weights_of(case: Case, model: ModelSpec, named: str) -> str:
    """The format to plan with; the config's own where the checkpoint is quantized."""
    stated = case.row["weight_dtype"].split("+")
    if model.prequantized:
        return ""
    if case.row["engine"].startswith("llama.cpp"):
        return dtype_name(stated[0]) or stated[0].lower()
    other = named or next((part for part in stated if part in _FORMATS), "")
    return _FORMATS.get(other, "")


def device_of(case: Case) -> Device:
    """The device, with the physical bytes that a row states."""
    text = re.sub(r"\(.*\)", "", case.row["gpu"]).strip()
    if text == "CPU":
        return Device("cpu", "cpu", 1 << 40, source="a dry run takes none")
    counted = re.fullmatch(r"(\d+)x ?(.+)", text)
    name = (counted[2] if counted else text).split("/")[0]
    plain = re.sub(r" +", "-", re.sub(r"(?i) \d+ ?GB( class)?$", "", name).strip()).lower()
    physical = re.search(r"([\d.]+) GiB physical", case.row["gpu"])
    try:
        device = find_device(plain)
    except UllageError:
        raise Unplanned(f"no device {case.row['gpu']!r} in the catalog") from None
    visible = case.measured.get("gpu_total_visible_gib") or (physical and float(physical[1]))
    return replace(device, memory_bytes=int(visible * GIB)) if visible else device


def version_of(case: Case) -> str:
    """The engine's version, as far as it is a number."""
    if case.row["engine"] != "vllm":
        return ""  # no other has constants by version
    found = re.search(r"\b0\.\d+(\.\d+)?", case.row["engine_version"])
    if not found or "dev19262" in case.row["engine_version"]:
        raise Unplanned(f"no version of the engine in {case.row['engine_version']!r}")
    return found[0]


def recipe_of(case: Case) -> Recipe:
    """The recipe of a case's settings.

    Raises:
        Unplanned: something that a plan needs is not stated.
    """
    name = case.row["engine"].split(" ")[0]
    engine = ENGINES.get(cast(Engine, name))
    if engine is None:
        raise Unplanned(f"the engine {name} has no plan here yet")
    if not case.row["tp"].isdecimal():
        raise Unplanned(f"tp {case.row['tp']}: experts are not split by themselves here")
    version = version_of(case)
    (model, named), device = model_of(case), device_of(case)
    stated = case.row["weight_dtype"].split("+")[0]
    defaults = engine.defaults(device)
    dtype = dtype_name(stated) or defaults.dtype
    utilization = case.setting(r"(?:gpu_memory_utilization=|util |mem.fraction.static )([\d.]+)")
    seqs = case.setting(r"max_num_seqs=(\d+)") or _first_number(case.row["batch_or_num_seqs"])
    chunk = case.setting(r"max_num_batched_tokens=(\d+)") or case.setting(r"-ub (\d+)")
    execution = replace(
        defaults,
        engine_version=version,
        dtype=dtype,
        kv_dtype=kv_dtype_name(case.row["kv_dtype"]) or dtype,
        prefill_chunk=int(chunk or defaults.prefill_chunk),
        utilization=float(utilization) if utilization else None,
        max_num_seqs=int(seqs) if seqs and name == "vllm" else None,
        tensor_parallel=int(case.row["tp"]),
        pipeline_parallel=int(case.setting(r"\bpp=(\d+)") or 1),
        attention="eager" if "-fa off" in case.notes else defaults.attention,
    )
    sequences = int(case.setting(r"-np (\d+)") or 1)
    context = int(case.row["context_or_max_model_len"] or model.max_context_tokens) // sequences
    recipe = Recipe(model, device, Workload(context - 1, 1, sequences), execution)
    weights = weights_of(case, model, named)
    return engine.with_weights(recipe, weights) if weights else recipe


def _first_number(text: str) -> str:
    found = re.match(r"\d+", text)
    return found[0] if found else ""


def planned_figures(plan: Plan) -> dict[str, float]:
    """A plan's figures by the table's names. vLLM's log is that of the pipeline's first rank."""
    share, execution = plan.share, plan.recipe.execution
    figures: dict[str, float] = {
        "kv_cache_tokens": share.kv_pool_tokens,
        "max_concurrency_x": share.max_concurrency,
        "weights_gib": share.weights_bytes / GIB,
        "peak_activation_gib": share.activation_bytes / GIB,
        "kv_cache_gib": share.kv_pool_bytes / GIB,
    }
    if execution.engine == "llama.cpp":
        decode = plan.phases["decode"]
        compute = decode.activation_bytes + decode.logits_bytes
        parts = (decode.weights_bytes, decode.kv_bytes, compute)
        names = ("model_buffer_gib", "kv_context_gib", "compute_buffer_gib")
        return dict(zip(names, (part / GIB for part in parts), strict=True))
    if execution.engine == "vllm" and execution.pipeline_parallel > 1:
        first = stages(plan.recipe.model.num_layers, execution.pipeline_parallel)[0]
        part = Footprint.of(stage_terms(plan.recipe, first, Constants(plan.recipe)))
        figures["weights_gib"] = part.weights_bytes / GIB
        figures["peak_activation_gib"] = (part.activation_bytes + part.logits_bytes) / GIB
        figures["kv_cache_gib"] = (plan.budget_bytes - part.total_bytes) / GIB
    figures["kv_cache_gb"], figures["weights_gb"] = figures["kv_cache_gib"], figures["weights_gib"]
    return figures


def figures_for(case: Case, plan: Plan) -> dict[str, float]:
    """What of a plan can be compared: of a start whose flags nobody stated, its tokens alone, as
    the plan puts them into the pool that was measured."""
    planned = planned_figures(plan)
    if case.states_flags or case.row["engine"].startswith("llama.cpp"):
        return planned
    pool_gib = case.measured.get("kv_cache_gib", case.measured.get("kv_cache_gb"))
    if pool_gib is None or not planned["kv_cache_gib"]:
        return {"weights_gib": planned["weights_gib"], "weights_gb": planned["weights_gb"]}
    tokens = planned["kv_cache_tokens"] * pool_gib / planned["kv_cache_gib"]
    return {"kv_cache_tokens": tokens}


def compare(cases: list[Case]) -> Iterator[Line]:
    """Plan each case and print its line, or the reason why there is none."""
    for case in cases:
        try:
            line = Line(case, figures_for(case, build_plan(recipe_of(case))))
        except (Unplanned, UllageError) as error:
            print(f"NOT PLANNED  {case.title}: {error}")
            continue
        shown = [_shown(line, name) for name in case.measured if line.error(name) is not None]
        print(f"{case.title}: {', '.join(shown) or 'nothing measured that a plan has'}")
        yield line


def _shown(line: Line, quantity: str) -> str:
    planned, measured = line.planned[quantity], line.case.measured[quantity]
    if "tokens" in quantity:
        return f"{quantity} {planned:,.0f} / {measured:,.0f} ({line.relative(quantity):+.2%})"
    return f"{quantity} {planned:.2f} / {measured:.2f} ({planned - measured:+.2f})"


def summary(lines: list[Line]) -> bool:
    """Print what the bars of the planner are about; True when all are reached."""
    vllm = [line for line in lines if line.case.row["engine"] == "vllm"]
    pools = [error for line in vllm if (error := line.error("kv_cache_gib")) is not None]
    good = bool(pools)
    if pools:
        error, left = mean(map(abs, pools)), sum(pool > GUARD_GIB for pool in pools)
        good = error <= 0.20 and not left
        print(f"vLLM KV pool, {len(pools)} cases: MAE {error:.3f} GiB a GPU, bias "
              f"{mean(pools):+.3f}, worst over-promise {max(pools):+.2f}, left after a guard of "
              f"{GUARD_GIB} GiB: {left}")  # fmt: skip
    good &= _within(vllm, "weights_gib", 0.01)
    good &= _within(vllm, "kv_cache_tokens", 0.02)
    llama = [line for line in lines if line.case.row["engine"].startswith("llama.cpp")]
    for quantity in ("model_buffer_gib", "kv_context_gib"):
        good &= _within(llama, quantity, 0.005)
    return good


def _within(lines: list[Line], quantity: str, bound: float) -> bool:
    """Print how many are within `bound` of what was measured."""
    errors = [error for line in lines if (error := line.relative(quantity)) is not None]
    if not errors:
        return True
    inside, worst = sum(abs(error) <= bound for error in errors), max(errors, key=abs)
    print(f"{quantity}: {inside} of {len(errors)} within {bound:.1%}, worst {worst:+.2%}")
    return inside == len(errors)


def main() -> int:
    """Print the lines and the summary; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ground_truth.csv")
    os.environ["HF_HUB_OFFLINE"] = "1"  # only what the catalog knows
    cases = read_cases(parser.parse_args().data / "ground_truth.csv")
    lines = list(compare(cases))
    print(f"\n{len(lines)} of {len(cases)} cases planned")
    return 0 if summary(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
