"""Settings of Dynamic Memory Sparsification and its bytes. No torch.

Each KV head decides for each token whether it stays; one that goes is still seen for `window`
tokens more, then its slot is free. Of T tokens a head keeps window + kept (T - window) on average.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ullage.errors import TechniqueError
from ullage.specs.blocks import BLOCK_TOKENS, block_bytes, dense_layer_bytes, full_layers
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.workload import Engine, Step
from ullage.techniques.base import Technique, with_full_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RING_BYTES = 8  # a token of the window and a head: its slot and its decision, 4 B each


@dataclass(frozen=True)
class DMS(Technique):
    """`kept` is the share of tokens that stay once they leave the window, over all heads; `window`
    is in tokens. Needs a model that was trained for it, about a thousand steps."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.05345"
    acts_on: ClassVar[Literal["kv"]] = "kv"
    runs: ClassVar[bool] = False
    engines: ClassVar[tuple[Engine, ...]] = ("ullage",)

    kept: float = 0.125
    window: int = 256

    def __post_init__(self) -> None:
        if type(self.kept) not in (int, float) or not 0 < self.kept <= 1:
            raise TechniqueError(f"dms: kept is above 0 and at most 1, not {self.kept!r}.")
        if type(self.window) is not int or self.window < 1:
            raise TechniqueError(f"dms: window is a positive count of tokens, not {self.window!r}.")

    @classmethod
    def neutral(cls) -> Self:
        return cls(kept=1.0)

    def unsupported(self, model: ModelSpec) -> str | None:
        if self.kept == 1 or full_layers(model):
            return None
        return "no layer of it keeps keys and values of every token, head by head."

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        if self.kept == 1:
            return before
        layer_bytes = self._layer_bytes(model, work)
        after = with_full_layers(before, model, work, layer_bytes)
        if work.phase != "prefill":
            return after
        # a layer is read whole before its decisions are carried out; prompts are read one at a time
        whole_bytes = dense_layer_bytes(model, work.held_tokens, work.execution.kv_dtype)
        extra_bytes = max(0, whole_bytes - layer_bytes)
        return replace(after, activation_bytes=after.activation_bytes + extra_bytes)

    def live_tokens(self, tokens: int) -> int:
        """Of `tokens`, those that a head keeps on average, rounded up."""
        return min(tokens, self.window + ceil(self.kept * max(0, tokens - self.window)))

    def _layer_bytes(self, model: ModelSpec, work: Step) -> int:
        """One layer of one sequence. Heads keep different numbers, so that each may leave its last
        block almost empty."""
        heads, tokens = model.num_kv_heads, work.held_tokens
        dense_blocks = heads * -(-tokens // BLOCK_TOKENS)
        blocks = heads + -(-heads * self.live_tokens(tokens) // BLOCK_TOKENS)
        ring_bytes = heads * min(tokens, self.window) * RING_BYTES
        return min(blocks, dense_blocks) * block_bytes(model, work.execution.kv_dtype) + ring_bytes

    def attach(self, model: "PreTrainedModel") -> AbstractContextManager[None]:
        raise TechniqueError(f"{self.name} can be planned, and is not run yet.")
