"""The contract of a technique (see CONTRIBUTING.md, "Add a technique")."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ullage.errors import TechniqueError
from ullage.specs.blocks import BLOCK_TOKENS, dense_layer_bytes, full_layers
from ullage.specs.device import Device
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.workload import Engine, Execution, Step, Workload

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

    from ullage.kv.cache import MakeRow


@dataclass(frozen=True)
class Technique(ABC):
    """One paper's way to take less memory. A subclass is a frozen dataclass; its fields are the
    settings, of JSON types."""

    paper: ClassVar[str]  # URL; equation and section numbers stand beside the code that does them
    acts_on: ClassVar[Literal["weights", "kv", "context", "facts"]]
    runs: ClassVar[bool] = True  # False: its bytes can be planned, and that is all yet
    engines: ClassVar[tuple[Engine, ...]] = ("ullage", "transformers")

    @property
    def name(self) -> str:
        """The name of the technique's folder."""
        return type(self).__module__.split(".")[-2]

    @classmethod
    @abstractmethod
    def neutral(cls) -> Self:
        """The setting that changes nothing, to the bit."""

    @abstractmethod
    def unsupported(self, model: ModelSpec) -> str | None:
        """Why this technique cannot act on `model`, in a sentence for its user; None when it
        can."""

    def settled(self, model: ModelSpec, work: Workload, execution: Execution) -> Self:
        """Itself with numbers of its own where it was given what depends on the model, the lengths
        or the formats, as a share of bytes does; what it is asked from here on, it is asked
        settled.

        Raises:
            TechniqueError: there are no such numbers.
        """
        return self

    @abstractmethod
    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        """The bytes of one phase with this technique, given those without. Arithmetic only;
        techniques chain."""

    def moved_bytes(self, model: ModelSpec, work: Step, device: Device) -> int:
        """Bytes that a forward pass moves beside the weights and KV entries that it holds: the one
        way in which a technique changes latency."""
        return 0

    @abstractmethod
    def attach(self, model: "PreTrainedModel") -> AbstractContextManager[None]:
        """Act on `model` while the context is open. State is born inside and dies inside: the model
        is bit-exact afterwards, also after an exception.

        Raises:
            TechniqueError: the model is one that `unsupported` names, or the technique is one that
                is planned only.
        """

    def rows(self, model: ModelSpec) -> "Mapping[int, MakeRow]":
        """What keeps one sequence's KV entries in a layer, by the layer's number, where they are
        not all kept."""
        return {}

    def held_blocks(self, model: ModelSpec, tokens: int) -> int:
        """Blocks that a sequence of `tokens` takes, at most, in the layers that would keep all of
        them, all together."""
        return full_layers(model) * model.num_kv_heads * -(-tokens // BLOCK_TOKENS)

    def most_tokens(self, model: ModelSpec) -> int:
        """Tokens of the longest sequence that `model` can read with it: as many as it was trained
        on, unless no two entries ever stand further apart, whatever the length."""
        return model.max_context_tokens

    def while_loading(
        self, model: "PreTrainedModel"
    ) -> "Mapping[str, Callable[[Module], Module]] | None":
        """What to make of modules, by their names, as soon as their ``weight`` has been read: so
        the full weights are never all there. None: the loader calls `attach` once all is read.

        Raises:
            TechniqueError: a library that this takes is not installed.
        """
        return None


def with_full_layers(
    before: Footprint, model: ModelSpec, work: Step, sequence_bytes: int
) -> Footprint:
    """`before` with `sequence_bytes` a sequence in the layers that kept every token, all together.

    Raises:
        TechniqueError: another technique has changed those layers already.
    """
    layer_bytes = dense_layer_bytes(model, work.held_tokens, work.execution.kv_dtype)
    dense_bytes = work.sequences * full_layers(model) * layer_bytes
    if before.kv_bytes < dense_bytes:
        raise TechniqueError("Only one technique can act on KV entries: leave the others out.")
    changed_bytes = work.sequences * sequence_bytes - dense_bytes
    return replace(before, kv_bytes=before.kv_bytes + changed_bytes)
