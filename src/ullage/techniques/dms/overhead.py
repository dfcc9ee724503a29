"""What DMS takes beside KV entries, in bytes. No torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ullage.specs.blocks import full_layers
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.model import ModelSpec
from ullage.specs.survivors import SPAN_TOKENS, Survival
from ullage.specs.workload import Step
from ullage.techniques.dms.adapter import DECIDED_TOKENS, LEARNED

if TYPE_CHECKING:
    from ullage.techniques.dms.settings import DMS

FUTURE_TOKENS = 512  # positions ahead that expected attention averages the rotation over
WAITING_TOKENS = 8  # whose queries expected attention takes into its sums at once
_FLAG_BYTES = 1  # a token of the window or of what is read beside it, and a head: whether it stays
_FP32_BYTES = 4  # of scorers' arithmetic


def state_bytes(dms: "DMS", model: ModelSpec, work: Step, kinds: Mapping[Survival, int]) -> int:
    """What one sequence keeps beside its blocks where there are so many heads of each of `kinds`:
    flags of the entries in its windows and of a span on its way there, and what the scorer keeps.
    """
    tokens = work.held_tokens
    flags_bytes = _FLAG_BYTES * sum(
        heads * min(survival.window + SPAN_TOKENS, tokens) for survival, heads in kinds.items()
    )
    return flags_bytes + _scorer_bytes(dms, model, tokens, work.execution.dtype)


def scratch_bytes(dms: "DMS", model: ModelSpec, work: Step) -> int:
    """While one row of one layer attends: the undecided and the new entries side by side; for each
    head masks of what leaves its window, and, as numbers, the one that the kernel is at; and what
    the scorer makes of the entries that it decides on."""
    new = min(SPAN_TOKENS, work.new_tokens) if work.phase == "prefill" else 1
    heads, number_bytes = model.num_kv_heads, DTYPE_BYTES[work.execution.dtype]
    span = dms.lag + DECIDED_TOKENS + new
    laid_out_bytes = 3 * span * 2 * heads * model.head_dim * number_bytes
    masks_bytes = new * new * (2 * heads + number_bytes) if new > 1 else 0
    return laid_out_bytes + masks_bytes + _scoring_bytes(dms, model, new)


def _scorer_bytes(dms: "DMS", model: ModelSpec, tokens: int, dtype: str) -> int:
    """Of a learned predictor the worth of what is undecided. Of expected attention the sums over
    the queries and their squares in fp32, [Hq, D] each a layer, with where the newest token stands
    and how far one turns, [D], [D] and [D / 2], and the newest queries with how they were turned,
    [Hq + 2, D] each a layer."""
    layers = full_layers(model)
    if dms.predictor == "window" or not tokens:
        return 0
    if dms.predictor in LEARNED:
        undecided = min(tokens, dms.lag + DECIDED_TOKENS)
        return layers * model.num_kv_heads * undecided * _FP32_BYTES
    waiting_bytes = min(tokens, WAITING_TOKENS) * (model.num_heads + 2) * DTYPE_BYTES[dtype]
    sums_bytes = (2 * model.num_heads + 3) * _FP32_BYTES
    return layers * model.head_dim * (sums_bytes + waiting_bytes)


def _scoring_bytes(dms: "DMS", model: ModelSpec, new: int) -> int:
    """Of a learned predictor hidden states of the `new` tokens. Of expected attention the keys that
    are decided on, as all query heads see them, and the angles of the positions ahead with what is
    made of these."""
    if dms.predictor == "window":
        return 0
    if dms.predictor in LEARNED:
        return new * model.hidden_size * _FP32_BYTES
    decided = 5 * model.num_heads * DECIDED_TOKENS * model.head_dim
    return (decided + 2 * FUTURE_TOKENS * model.head_dim) * _FP32_BYTES
