"""Settings of CAMELoT, and what a sequence holds by them. No torch.

The newest tokens are kept as they are. What leaves them is merged into the likest of `slots`
slots, or takes a slot of its own: the stalest's, once all are full. So bytes do not grow with a
text.

The paper's body, with its equations and settings, is in no place that could be read when this was
written: what is established of it is that a token's key retrieves and that similar tokens are
consolidated, novel ones have slots of their own and the stalest are replaced. All else here is a
reconstruction.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from ullage.errors import TechniqueError
from ullage.specs.blocks import block_bytes, full_layer_numbers, full_layers
from ullage.specs.consolidation import Consolidation, Positions
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.survivors import SINKS
from ullage.specs.workload import Engine, Step
from ullage.techniques.base import Technique, with_full_layers
from ullage.techniques.camelot.overhead import OPERATORS_BYTES, scratch_bytes, state_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullage.kv.cache import MakeRow

# transformers turns a position's angle in fp32: up to here it is off by 1/8 of a radian at most
_MOST_TOKENS = 1 << 22


@dataclass(frozen=True)
class CAMELoT(Technique):
    """`slots` a KV head and layer beside the current segment of `segment` tokens; no slots is the
    model as it is. A token is merged into a slot if the cosine of their keys is at least
    `threshold`: above 1 none is, and the bank holds the newest tokens.

    A token reads the `top_k` slots that are likest to it and to those before it in its segment, or,
    with 0, all. Slots are read at `positions`: "constant", all of them at one distance, or
    "compact", in the order of their age. With `count_bias` a slot weighs as much as the tokens that
    were merged into it; `count_cap`, 0 for none, bounds how many it counts, so that old slots go on
    changing.

    Not the paper's: `recent` tokens before the segment stay as they are too, and are consolidated
    later, which helps most; `centred` likens keys by what sets them apart from the slots' mean.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.13449"
    acts_on: ClassVar[Literal["context"]] = "context"
    engines: ClassVar[tuple[Engine, ...]] = ("ullage",)

    slots: int = 1024
    segment: int = 512
    threshold: float = 0.9
    top_k: int = 0
    recent: int = 0
    positions: Positions = "compact"
    count_bias: bool = False
    count_cap: int = 0
    centred: bool = False

    def __post_init__(self) -> None:
        for name in ("slots", "top_k", "recent", "count_cap"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise TechniqueError(f"camelot: {name} is a count, not {value!r}.")
        if type(self.segment) is not int or self.segment < 1:
            raise TechniqueError(
                f"camelot: segment is a positive count of tokens, not {self.segment!r}."
            )
        if type(self.threshold) not in (int, float) or not -1 <= self.threshold <= 2:
            raise TechniqueError(
                f"camelot: threshold is a cosine, from -1 to 1, or up to 2 so that nothing is "
                f"merged, not {self.threshold!r}."
            )
        if self.positions not in get_args(Positions):
            raise TechniqueError(
                f"camelot: positions is one of {', '.join(get_args(Positions))}, not "
                f"{self.positions!r}."
            )
        for name in ("count_bias", "centred"):
            if type(getattr(self, name)) is not bool:
                raise TechniqueError(
                    f"camelot: {name} is true or false, not {getattr(self, name)!r}."
                )

    @classmethod
    def neutral(cls) -> Self:
        return cls(slots=0)

    @property
    def rules(self) -> Consolidation:
        """What each row goes by."""
        return Consolidation(sinks=SINKS, **asdict(self))

    def unsupported(self, model: ModelSpec) -> str | None:
        if not self.slots:
            return None
        if not full_layers(model):
            return "no layer of it keeps keys and values of every token, head by head."
        if not model.rope_tables:
            return "its positions are not rotary, and keys hold them for good."
        return None

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        if not self.slots:
            return before
        tokens = work.held_tokens
        kv_dtype = work.execution.kv_dtype
        sequence_bytes = self.held_blocks(model, tokens) * block_bytes(model, kv_dtype)
        sequence_bytes += full_layers(model) * state_bytes(self.rules, model, tokens, kv_dtype)
        after = with_full_layers(before, model, work, sequence_bytes)
        if work.phase == "load":
            return after
        return replace(
            after,
            activation_bytes=after.activation_bytes + scratch_bytes(self.rules, model, work),
            overhead_bytes=after.overhead_bytes + OPERATORS_BYTES,
        )

    def held_blocks(self, model: ModelSpec, tokens: int) -> int:
        if not self.slots:
            return super().held_blocks(model, tokens)
        return full_layers(model) * model.num_kv_heads * self.rules.blocks(tokens)

    def most_tokens(self, model: ModelSpec) -> int:
        trained = model.max_context_tokens
        sliding = sum(cache.window is not None for cache in model.caches)
        if not self.slots or full_layers(model) + sliding < model.num_layers:
            return trained
        return max(trained, _MOST_TOKENS) if self.rules.reach < trained else trained

    @contextmanager
    def attach(self, model: "PreTrainedModel") -> Iterator[None]:
        from ullage.kv.attach import rows_in
        from ullage.kv.banked import BankRow
        from ullage.kv.frequencies import fixed_frequencies
        from ullage.specs.families import spec_from_config

        spec = spec_from_config(model.config.get_text_config().to_dict())
        reason = self.unsupported(spec)
        if reason is None and self.slots and not spec.runs:
            reason = f"ullage plans {spec.family} models and does not run them yet."
        if reason is not None:
            raise TechniqueError(f"{self.name} cannot act on this model: {reason}")
        rows = self.rows(spec)
        if not rows:
            yield
            return
        with fixed_frequencies(model), rows_in(model, rows, BankRow, "CAMELoT"):
            yield

    def rows(self, model: ModelSpec) -> "Mapping[int, MakeRow]":
        if not self.slots:
            return {}
        from ullage.kv.banked import BankRow
        from ullage.kv.pool import Blocks

        rules = self.rules

        def make_row(pool: Blocks, num_kv_heads: int) -> BankRow:
            return BankRow(pool, num_kv_heads, rules)

        return dict.fromkeys(full_layer_numbers(model), make_row)
