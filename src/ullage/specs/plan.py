"""Plan: what will run where, in how many bytes. Data only, the same in JSON as in Python."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.specs.decode import decode
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES, KV_BITS
from ullage.specs.footprint import Footprint
from ullage.specs.latency import Latency
from ullage.specs.model import ModelSpec
from ullage.specs.workload import PHASES, Execution, PhaseName, Workload

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class TechniqueChoice:
    """A technique's folder name and its settings, as JSON types."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a run, but for the budget."""

    model: ModelSpec
    device: Device
    workload: Workload
    execution: Execution
    techniques: tuple[TechniqueChoice, ...] = ()

    @property
    def beyond_context(self) -> bool:
        """Whether a sequence is longer than the model's own context."""
        return self.workload.context_tokens > self.model.max_context_tokens


@dataclass(frozen=True)
class Cliff:
    """The largest sizes that still fit: one more token, or one more sequence, fails. 0: none fits;
    None: every size does.

    `max_model_len` is in tokens at the planned number of sequences, `max_num_seqs` in sequences at
    the planned length. Memory alone decides: the model's own context may end before.
    """

    max_model_len: int | None
    max_num_seqs: int | None


@dataclass(frozen=True)
class DeviceShare:
    """What one device holds while it serves: the peak of everything but KV entries, and the pool
    that is left for those.

    `kv_pool_tokens` is what the pool holds at the planned length, over all sequences;
    `max_concurrency` how many sequences of that length. With several devices it is the fullest.
    """

    weights_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    graph_bytes: int
    kv_pool_bytes: int
    kv_pool_tokens: int
    max_concurrency: float


@dataclass(frozen=True)
class Plan:
    """A recipe, the budget it is held against, and the bytes of each phase: per device, where a
    model is spread over several. `latency` is None where the device's speed is not known."""

    recipe: Recipe
    budget_bytes: int
    phases: dict[PhaseName, Footprint]
    share: DeviceShare
    cliff: Cliff
    kv_bytes_per_token: int
    latency: Latency | None

    @property
    def peak_bytes(self) -> int:
        """The largest phase's total."""
        return max(footprint.total_bytes for footprint in self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the peak stays inside the budget."""
        return self.peak_bytes <= self.budget_bytes

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types: the documented figures first, then all that `from_json` needs."""
        recipe = self.recipe
        return {
            "schema_version": SCHEMA_VERSION,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.budget_bytes,
            "phases": {
                name: {**asdict(footprint), "total_bytes": footprint.total_bytes}
                for name, footprint in self.phases.items()
            },
            "cliff": asdict(self.cliff),
            **asdict(self.share),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "latency": None if self.latency is None else asdict(self.latency),
            "model": {**recipe.model.to_json(), "parameters": recipe.model.parameters},
            "device": asdict(recipe.device),
            "workload": asdict(recipe.workload),
            "execution": asdict(recipe.execution),
            "techniques": [asdict(choice) for choice in recipe.techniques],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            InputError: the data is not a plan, or one of another schema version.
        """
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                "This is not a plan that this version of ullage wrote: `ullage plan MODEL --json` "
                "writes one."
            )
        try:
            plan = decode(cls, _nested(data), "plan")
            _refuse_impossible(plan)
        except KeyError as error:
            raise InputError(f"The plan is damaged: it has no {error}. Write it again.") from error
        except InputError as error:
            raise InputError(f"The plan is damaged: {error} Write it again.") from error
        return plan  # type: ignore[no-any-return]


def _nested(data: dict[str, Any]) -> dict[str, Any]:
    """What `to_json` wrote, as the fields of a Plan: without the sums, which follow from these."""
    recipe = {field.name: data[field.name] for field in fields(Recipe)}
    recipe["model"] = _without("parameters", recipe["model"])
    phases = data["phases"]
    if isinstance(phases, dict):
        phases = {name: _without("total_bytes", phases.get(name)) for name in PHASES}
    share = {field.name: data[field.name] for field in fields(DeviceShare)}
    whole = {"recipe": recipe, "phases": phases, "share": share}
    plain = {field.name: data[field.name] for field in fields(Plan) if field.name not in whole}
    return plain | whole


def _without(key: str, data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    return {name: value for name, value in data.items() if name != key}


def _refuse_impossible(plan: Plan) -> None:
    """Refuse sizes of nothing and formats that there are not: their types alone allow them."""
    work, execution = plan.recipe.workload, plan.recipe.execution
    sizes = {
        "budget_bytes": plan.budget_bytes,
        "memory_bytes": plan.recipe.device.memory_bytes,
        **asdict(work),
        "tensor_parallel": execution.tensor_parallel,
        "pipeline_parallel": execution.pipeline_parallel,
    }
    for name, size in sizes.items():
        if size == 0:
            raise InputError(f"{name} is 0.")
    for dtype, known in ((execution.dtype, DTYPE_BYTES), (execution.kv_dtype, KV_BITS)):
        if dtype not in known:
            raise InputError(f"{dtype!r} is no format that is known.")


def read_plan(path: Path) -> Plan:
    """The plan in a file that `ullage plan --json` wrote; of a search, its best.

    Raises:
        InputError: no such file, not a plan, or a search that found none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "goal" in data:
            data = data.get("best")
            if data is None:
                raise InputError(f"{path}: of what was searched nothing fits, so there is no plan.")
        return Plan.from_json(data)
    except OSError as error:
        raise InputError(f"Cannot read the plan {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: write it with `ullage plan --json`.") from error
