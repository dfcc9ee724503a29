"""Settings of Dynamic Memory Sparsification and its bytes. No torch.

Each KV head decides for each token whether it stays; one that goes is still seen until `window`
tokens more are written, then its slot is free. Of T tokens a head keeps window + kept (T - window)
on average.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from ullage.errors import TechniqueError
from ullage.specs.blocks import block_bytes, full_layer_numbers, full_layers
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.survivors import SPAN_TOKENS, Survival
from ullage.specs.workload import Engine, Step
from ullage.techniques.base import Technique, with_full_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullage.kv.cache import MakeRow

Predictor = Literal["expected-attention", "window"]

SINKS = 4  # first tokens, which attention falls back on: StreamingLLM (arXiv 2309.17453)
DECIDED_TOKENS = 64  # at once
FUTURE_TOKENS = 512  # positions ahead that expected attention averages the rotation over
FLAG_BYTES = 1  # a token of the window and a head: whether it stays


@dataclass(frozen=True)
class DMS(Technique):
    """`kept` is the share of tokens that stay once they leave the `window`, in tokens, over all
    heads. Which, `predictor` says: by the attention that they can expect, without training; or,
    whatever `kept` is below 1, none but the first few, the baseline."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.05345"
    acts_on: ClassVar[Literal["kv"]] = "kv"
    engines: ClassVar[tuple[Engine, ...]] = ("ullage",)

    kept: float = 0.5
    window: int = 512
    predictor: Predictor = "expected-attention"

    def __post_init__(self) -> None:
        if type(self.kept) not in (int, float) or not 0 < self.kept <= 1:
            raise TechniqueError(f"dms: kept is above 0 and at most 1, not {self.kept!r}.")
        if type(self.window) is not int or self.window < 1:
            raise TechniqueError(f"dms: window is a positive count of tokens, not {self.window!r}.")
        if self.predictor not in get_args(Predictor):
            known = ", ".join(get_args(Predictor))
            raise TechniqueError(f"dms: predictor is one of {known}, not {self.predictor!r}.")

    @classmethod
    def neutral(cls) -> Self:
        return cls(kept=1.0)

    @property
    def survival(self) -> Survival:
        """Who survives the window."""
        kept = 0.0 if self.predictor == "window" else self.kept
        return Survival(kept, self.window, min(DECIDED_TOKENS, self.window), SINKS)

    def unsupported(self, model: ModelSpec) -> str | None:
        if self.kept == 1 or full_layers(model):
            return None
        return "no layer of it keeps keys and values of every token, head by head."

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        if self.kept == 1:
            return before
        blocks_bytes = self.layer_blocks(model, work.held_tokens) * block_bytes(
            model, work.execution.kv_dtype
        )
        after = with_full_layers(before, model, work, blocks_bytes + self._state_bytes(model, work))
        if work.phase == "load":
            return after
        scratch_bytes = self._scratch_bytes(model, work)
        return replace(after, activation_bytes=after.activation_bytes + scratch_bytes)

    def layer_blocks(self, model: ModelSpec, tokens: int) -> int:
        if self.kept == 1:
            return super().layer_blocks(model, tokens)
        return self.survival.blocks(tokens, model.num_kv_heads)

    def _state_bytes(self, model: ModelSpec, work: Step) -> int:
        """What a row keeps beside its blocks: flags of the window, and the scorer's sums over the
        queries and their squares in fp32, [Hq, D] each, with where the newest token stands and how
        far one turns, [D], [D] and [D / 2]."""
        if not work.held_tokens:
            return 0
        flags_bytes = model.num_kv_heads * self.window * FLAG_BYTES
        sums_bytes = (2 * model.num_heads + 3) * model.head_dim * 4
        return flags_bytes + (sums_bytes if self.predictor == "expected-attention" else 0)

    def _scratch_bytes(self, model: ModelSpec, work: Step) -> int:
        """While one row of one layer attends: window and new tokens side by side under a mask for
        each head and, as numbers, for the one that the kernel is at; and what the scorer makes of
        the entries that it decides on."""
        new = min(SPAN_TOKENS, work.new_tokens) if work.phase == "prefill" else 0
        span = self.window + new
        number_bytes = DTYPE_BYTES[work.execution.dtype]
        laid_out = 2 * span * 2 * model.num_kv_heads * model.head_dim * number_bytes
        masks = new * span * (2 * model.num_kv_heads + number_bytes)
        decided = min(DECIDED_TOKENS, self.window)
        ahead = FUTURE_TOKENS * model.head_dim  # their angles, and what is made of these
        scored = (5 * model.num_heads * decided * model.head_dim + 2 * ahead) * 4
        return laid_out + masks + scored

    @contextmanager
    def attach(self, model: "PreTrainedModel") -> Iterator[None]:
        from ullage.specs.families import spec_from_config
        from ullage.techniques.dms.attach import sparse

        spec = spec_from_config(model.config.get_text_config().to_dict())
        reason = self.unsupported(spec)
        if reason is None and not spec.runs and self.kept < 1:
            reason = f"ullage plans {spec.family} models and does not run them yet."
        if reason is not None:
            raise TechniqueError(f"{self.name} cannot act on this model: {reason}")
        rows = self.rows(spec)
        if not rows:
            yield
            return
        with sparse(model, rows):
            yield

    def rows(self, model: ModelSpec) -> "Mapping[int, MakeRow]":
        if self.kept == 1:
            return {}
        from ullage.techniques.dms.rows import row_maker

        return dict.fromkeys(full_layer_numbers(model), row_maker(self))
