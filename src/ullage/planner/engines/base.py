"""What the planner asks of an engine's module. Adding an engine is adding a file that has these."""

from collections.abc import Mapping
from typing import Protocol

from ullage.planner.constants import Constants
from ullage.specs.footprint import Footprint, Term
from ullage.specs.plan import DeviceShare, Recipe
from ullage.specs.workload import PhaseName, Step


class EngineArithmetic(Protocol):
    """The memory of one engine, per device: its terms, its limits and its defaults."""

    KV_DTYPES: tuple[str, ...]
    WEIGHTS: tuple[str, ...]

    def settle(self, recipe: Recipe) -> Recipe:
        """`recipe` with the engine's own defaults where nothing was asked for.

        Raises:
            InputError: something that the engine does not have.
        """

    def limit_bytes(self, recipe: Recipe) -> int:
        """Bytes that the engine lets itself take of one device."""

    def step(self, recipe: Recipe, phase: PhaseName) -> Step:
        """The largest forward pass of a phase."""

    def terms(self, recipe: Recipe, step: Step, constants: Constants) -> list[Term]:
        """The peak of a phase on the fullest device, one factor a line, without techniques."""

    def share(
        self,
        recipe: Recipe,
        phases: Mapping[PhaseName, Footprint],
        budget_bytes: int,
        constants: Constants,
    ) -> DeviceShare:
        """What one device holds inside `budget_bytes`, given the peak of each phase with all
        techniques, and the KV pool that is left."""
