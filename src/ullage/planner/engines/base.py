"""What the planner asks of an engine. Adding an engine is adding a file with one subclass."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ullage.errors import InputError
from ullage.planner.constants import Constants
from ullage.specs.device import Device, DeviceKind
from ullage.specs.dtypes import KV_BITS
from ullage.specs.footprint import Footprint, Term
from ullage.specs.model import ModelSpec
from ullage.specs.plan import DeviceShare, Recipe
from ullage.specs.workload import Attention, Execution, PhaseName, Step


@dataclass(frozen=True)
class Planned:
    """A recipe, the budget of one device, and the peak of each phase with all techniques."""

    recipe: Recipe
    phases: Mapping[PhaseName, Footprint]
    budget_bytes: int
    constants: Constants


class EngineArithmetic(ABC):
    """The memory of one engine, per device: its terms, its limits and its defaults."""

    kv_dtypes: ClassVar[tuple[str, ...]]
    weights: ClassVar[tuple[str, ...]]
    attentions: ClassVar[tuple[Attention, ...]]  # the usual one first
    kinds: ClassVar[tuple[DeviceKind, ...]] = ("cpu", "cuda", "rocm", "mps")  # of devices
    converts: ClassVar[bool] = False  # makes a file of its own of any checkpoint, quantized or not
    takes_share: ClassVar[bool] = False  # is told what share of a device to take

    @abstractmethod
    def defaults(self, device: Device) -> Execution:
        """What the engine runs on `device` when nothing is asked."""

    @abstractmethod
    def with_weights(self, recipe: Recipe, weights: str) -> Recipe:
        """`recipe` with its weights in the format called `weights`, one of `self.weights`."""

    def makes(self, device: Device) -> tuple[str, ...]:
        """Of `self.weights` those that it makes of a plain checkpoint on `device`: others have to
        be in the checkpoint."""
        return self.weights

    def token_bytes(self, model: ModelSpec, width: int, kv_dtype: str) -> float:
        """KV bytes of one token, of which `width` numbers are kept."""
        return width * KV_BITS[kv_dtype] / 8

    def settle(self, recipe: Recipe) -> Recipe:
        """`recipe` with the engine's own defaults where nothing was asked for.

        Raises:
            InputError: something that the engine does not have.
        """
        execution = recipe.execution
        if execution.tensor_parallel * execution.pipeline_parallel > 1:
            raise InputError(
                f"{execution.engine} runs on one device here: leave --tp and --pp out."
            )
        if execution.utilization is not None and not self.takes_share:
            raise InputError(
                f"{execution.engine} takes no share of a device: give a budget with --memory."
            )
        return recipe

    def limit_bytes(self, recipe: Recipe) -> int:
        """Bytes that the engine lets itself take of one device."""
        return recipe.device.memory_bytes

    def within(self, recipe: Recipe, budget_bytes: int) -> Recipe:
        """A settled `recipe` as the engine is told of a budget of each device."""
        return recipe

    @abstractmethod
    def step(self, recipe: Recipe, phase: PhaseName) -> Step:
        """The largest forward pass of a phase."""

    @abstractmethod
    def terms(self, recipe: Recipe, step: Step, constants: Constants) -> list[Term]:
        """The peak of a phase on the fullest device, one factor a line, without techniques."""

    def worst_request_terms(self, recipe: Recipe) -> list[Term]:
        """What a single request can take outside of the plan's sum, one cause a line."""
        return []

    def share(self, planned: Planned) -> DeviceShare:
        """What one device holds inside the budget: the KV pool gets what the highest phase leaves
        beside its KV entries."""
        phases = planned.phases
        serving = (phases["prefill"], phases["decode"])
        beside_bytes = max(part.total_bytes - part.kv_bytes for part in phases.values())
        pool_bytes = max(0, planned.budget_bytes - beside_bytes)
        work = planned.recipe.workload
        concurrency = pool_bytes * work.sequences / max(1, phases["decode"].kv_bytes)
        return DeviceShare(
            weights_bytes=phases["decode"].weights_bytes,
            activation_bytes=max(part.activation_bytes + part.logits_bytes for part in serving),
            non_torch_bytes=phases["decode"].overhead_bytes,
            graph_bytes=0,
            kv_pool_bytes=pool_bytes,
            kv_pool_tokens=int(concurrency * work.context_tokens),
            max_concurrency=round(concurrency, 2),
        )
