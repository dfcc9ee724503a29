"""Plan: what will run where, in how many bytes. Data only, the same in JSON as in Python."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ullage.errors import InputError
from ullage.specs.device import Device
from ullage.specs.footprint import Footprint
from ullage.specs.latency import Latency
from ullage.specs.model import ModelSpec
from ullage.specs.workload import PHASES, Execution, PhaseName, Workload

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Data = TypeVar("_Data", bound="DataclassInstance")

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
            raise InputError("This is not a plan that this version of ullage wrote.")
        try:
            plan = cls(
                recipe=_recipe(data),
                budget_bytes=data["budget_bytes"],
                phases={name: _footprint(data["phases"][name]) for name in PHASES},
                share=_whole(DeviceShare, _only(DeviceShare, data)),
                cliff=_whole(Cliff, data["cliff"]),
                kv_bytes_per_token=data["kv_bytes_per_token"],
                latency=data["latency"] and Latency.from_json(data["latency"]),
            )
            sizes = (plan.budget_bytes, *asdict(plan.recipe.workload).values())
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise TypeError("a size that is no positive integer")
            return plan
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"The plan is damaged: {error!r}. Write it again.") from error


def _recipe(data: dict[str, Any]) -> Recipe:
    model = {key: value for key, value in data["model"].items() if key != "parameters"}
    return Recipe(
        model=ModelSpec.from_json(model),
        device=_whole(Device, data["device"]),
        workload=_whole(Workload, data["workload"]),
        execution=_whole(Execution, data["execution"]),
        techniques=tuple(_whole(TechniqueChoice, choice) for choice in data["techniques"]),
    )


def _footprint(data: dict[str, int]) -> Footprint:
    parts = {key: value for key, value in data.items() if key != "total_bytes"}
    return _whole(Footprint, parts)


def _only(cls: type["DataclassInstance"], data: dict[str, Any]) -> dict[str, Any]:
    """Of `data`, the fields of `cls`."""
    return {field.name: data[field.name] for field in fields(cls)}


def _whole(cls: type[_Data], data: dict[str, Any]) -> _Data:
    """The dataclass from all of its fields: what is missing must not become a default."""
    for field in fields(cls):
        data[field.name]  # KeyError
    return cls(**data)


def read_plan(path: Path) -> Plan:
    """The plan in a file that `ullage plan --json` wrote.

    Raises:
        InputError: no such file, or not a plan.
    """
    try:
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"Cannot read the plan {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: write it with `ullage plan --json`.") from error
