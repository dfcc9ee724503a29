"""What CAMELoT takes beside KV entries, in bytes. No torch."""

from ullage.specs.blocks import entry_bytes
from ullage.specs.consolidation import Consolidation
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.model import ModelSpec
from ullage.specs.workload import Step

# Of libraries, code that no other operator brings in: 7.5 MB measured with torch 2.13.0+cpu
OPERATORS_BYTES = 8 << 20
_FP32_BYTES = 4
_COUNT_BYTES, _STAMP_BYTES, _BIAS_BYTES, _VISIBLE_BYTES = 4, 4, 4, 1  # of a slot


def state_bytes(rules: Consolidation, model: ModelSpec, tokens: int, kv_dtype: str) -> int:
    """What one layer of one sequence keeps beside its blocks: of each slot its count, its stamp and
    what it adds to scores; where slots are retrieved whether it was, where it points in fp32, and
    what it adds to likenesses; and its key once more where it is read in another place. How far a
    position turns, 2 [D / 2]. Once there are slots a query, 4 [D], and, where they are retrieved,
    what they point from, [D] for each head.
    """
    slot_bytes = _COUNT_BYTES + _STAMP_BYTES + _BIAS_BYTES
    if rules.top_k:
        slot_bytes += _VISIBLE_BYTES + (model.head_dim + 1) * _FP32_BYTES
    if rules.positions == "compact":
        slot_bytes += entry_bytes(model, model.head_dim, kv_dtype)
    slots = rules.banked(tokens)
    angles = (1 + (4 if slots else 0)) * model.head_dim if tokens else 0
    middle = model.num_kv_heads * model.head_dim if slots and rules.top_k else 0
    return model.num_kv_heads * slots * slot_bytes + (angles + middle) * _FP32_BYTES


def scratch_bytes(rules: Consolidation, model: ModelSpec, work: Step) -> int:
    """While one row of one layer attends or writes, whichever is more; and what the others ask
    meanwhile, where sequences write together: two turned queries each, and biases."""
    slots = rules.banked(work.held_tokens)
    if not slots:
        return 0
    reading = work.phase == "prefill"
    new = min(rules.segment, work.new_tokens) if reading else 1
    waiting_numbers = 2 * model.num_heads * model.head_dim
    waiting_numbers += model.num_kv_heads * slots if rules.top_k else 0
    others = 0 if reading else work.sequences - 1
    return others * waiting_numbers * _FP32_BYTES + max(
        _reading_bytes(rules, model, work.execution.dtype, slots, new),
        _writing_bytes(rules, model, slots),
    )


def _reading_bytes(rules: Consolidation, model: ModelSpec, dtype: str, slots: int, new: int) -> int:
    """The queries turned, thrice in fp32 on the way. Each slot's bias, [Hq, 1, M]. Where slots are
    retrieved, their keys widened and normed, and what each token sees of them: likenesses, flags
    with their sums, and biases. Where they are turned one by one, K and V widened, and what turns
    them."""
    heads, head_dim = model.num_kv_heads, model.head_dim
    queries_bytes = 4 * model.num_heads * new * head_dim * _FP32_BYTES
    bias_bytes = model.num_heads * slots * (_FP32_BYTES + DTYPE_BYTES[dtype])
    bank_bytes = heads * slots * head_dim * _FP32_BYTES
    if rules.top_k:
        bias_bytes *= new
        bias_bytes += heads * new * slots * (2 * _FP32_BYTES + 16 + 2) + 3 * bank_bytes
    if rules.positions == "compact":
        bias_bytes += 8 * bank_bytes
    return queries_bytes + bias_bytes


def _writing_bytes(rules: Consolidation, model: ModelSpec, slots: int) -> int:
    """In fp32: K and V of a segment, K turned and normed; the bank's as they were, with their keys
    normed, as they are summed up and as they become; and how like each token is to each slot."""
    heads, head_dim, segment = model.num_kv_heads, model.head_dim, rules.segment
    tokens_bytes = 6 * heads * segment * head_dim * _FP32_BYTES
    bank_bytes = 7 * heads * slots * head_dim * _FP32_BYTES
    return tokens_bytes + bank_bytes + 2 * heads * segment * slots * _FP32_BYTES
