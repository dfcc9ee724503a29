"""Settings of CAMELoT and its bytes. No torch.

The newest `segment` tokens are kept as they are. What leaves them is merged into the nearest of
`slots` slots, or takes the place of the oldest: key, value, count and age, for each layer and KV
head. So the bytes do not grow beyond the window.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ullage.errors import TechniqueError
from ullage.specs.blocks import dense_layer_bytes, entry_bytes, full_layers
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.workload import Engine, Step
from ullage.techniques.base import Technique, with_full_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNT_AND_AGE_BYTES = 4 + 4  # of a slot
SIMILARITY_BYTES = 4  # fp32, between a new key and a slot


@dataclass(frozen=True)
class CAMELoT(Technique):
    """`slots` a KV head and layer, and the newest `segment` tokens exactly; no slots is the model
    as it is."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.13449"
    acts_on: ClassVar[Literal["context"]] = "context"
    runs: ClassVar[bool] = False
    engines: ClassVar[tuple[Engine, ...]] = ("ullage",)

    slots: int = 1024
    segment: int = 512

    def __post_init__(self) -> None:
        if type(self.slots) is not int or self.slots < 0:
            raise TechniqueError(f"camelot: slots is a count, not {self.slots!r}.")
        if type(self.segment) is not int or self.segment < 1:
            raise TechniqueError(
                f"camelot: segment is a positive count of tokens, not {self.segment!r}."
            )

    @classmethod
    def neutral(cls) -> Self:
        return cls(slots=0)

    def unsupported(self, model: ModelSpec) -> str | None:
        if not self.slots or full_layers(model):
            return None
        return "no layer of it keeps keys and values of every token, head by head."

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        if not self.slots or work.held_tokens <= self.segment:
            return before
        kv_dtype = work.execution.kv_dtype
        window_bytes = dense_layer_bytes(model, self.segment, kv_dtype)
        layer_bytes = window_bytes + self.bank_bytes(model, kv_dtype)
        after = with_full_layers(before, model, work, full_layers(model) * layer_bytes)
        # new keys beside the window, and how like each slot each of them is
        width = 2 * model.num_kv_heads * model.head_dim
        similarity_bytes = model.num_kv_heads * self.slots * SIMILARITY_BYTES
        token_bytes = width * DTYPE_BYTES[work.execution.dtype] + similarity_bytes
        scratch_bytes = work.new_tokens * token_bytes
        return replace(after, activation_bytes=after.activation_bytes + scratch_bytes)

    def bank_bytes(self, model: ModelSpec, kv_dtype: str) -> int:
        """The memory of one layer of one sequence."""
        slot_bytes = entry_bytes(model, 2 * model.head_dim, kv_dtype) + COUNT_AND_AGE_BYTES
        return model.num_kv_heads * self.slots * slot_bytes

    def attach(self, model: "PreTrainedModel") -> AbstractContextManager[None]:
        raise TechniqueError(f"{self.name} can be planned, and is not run yet.")
