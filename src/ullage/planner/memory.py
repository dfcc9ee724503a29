"""The bytes of each phase: one factor a line, with its unit and its reason.

Letters as in the field: N new tokens in a forward pass, T held tokens.
"""

from ullage import techniques
from ullage.planner.constants import runtime_bytes
from ullage.specs.blocks import sequence_bytes
from ullage.specs.calibration import Calibration
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Footprint
from ullage.specs.loading import load_spike_bytes
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.plan import Recipe
from ullage.specs.workload import PHASES, Execution, PhaseName, Step

KV_TILE_TOKENS = 1024  # stored entries that the kernels convert to the arithmetic's format at once


def phase_footprints(
    recipe: Recipe, calibration: Calibration | None = None
) -> dict[PhaseName, Footprint]:
    """The peak of each phase, all techniques applied in their order."""
    chain = [techniques.create(choice) for choice in recipe.techniques]
    footprints: dict[PhaseName, Footprint] = {}
    for phase in PHASES:
        step = _step(recipe, phase)
        footprint = _footprint(recipe, step, calibration)
        for technique in chain:
            footprint = technique.footprint(footprint, recipe.model, step)
        footprints[phase] = footprint
    return footprints


def peak_bytes(recipe: Recipe, calibration: Calibration | None = None) -> int:
    """The largest phase's total."""
    return max(part.total_bytes for part in phase_footprints(recipe, calibration).values())


def kv_bytes_per_token(recipe: Recipe) -> int:
    """Bytes that each further token of one sequence adds: the layers without a window, or all where
    every layer slides."""
    caches = recipe.model.caches
    growing = sum(cache.width for cache in caches if cache.window is None)
    width = growing or sum(cache.width for cache in caches)
    return width * DTYPE_BYTES[recipe.execution.kv_dtype]


def _step(recipe: Recipe, phase: PhaseName) -> Step:
    work, execution = recipe.workload, recipe.execution
    chunk_tokens = min(execution.prefill_chunk or work.prompt_tokens, work.prompt_tokens)
    if execution.engine == "ullage":
        # Room for prompt and output is reserved at the door; prompts are read one at a time.
        held = {"load": 0, "prefill": work.context_tokens, "decode": work.context_tokens}
        new = {"load": 0, "prefill": chunk_tokens, "decode": work.sequences}
    else:
        # The last token out is never fed back, so its KV entries are never made.
        held = {"load": 0, "prefill": work.prompt_tokens, "decode": work.context_tokens - 1}
        new = {"load": 0, "prefill": chunk_tokens * work.sequences, "decode": work.sequences}
    return Step(phase, work.sequences, held[phase], new[phase], execution)


def _footprint(recipe: Recipe, step: Step, calibration: Calibration | None) -> Footprint:
    """One phase without techniques."""
    model, dtype = recipe.model, step.execution.dtype
    number_bytes = DTYPE_BYTES[dtype]
    overhead_bytes = runtime_bytes(recipe.device, step.execution.engine)
    if calibration is not None:
        overhead_bytes = calibration.runtime_bytes
    weights_bytes = model.weights_bytes(dtype)
    if step.phase == "load":
        return Footprint(
            weights_bytes=weights_bytes,
            activation_bytes=_load_scratch_bytes(model, step.execution),
            overhead_bytes=overhead_bytes,
        )
    return Footprint(
        weights_bytes=weights_bytes,
        kv_bytes=_kv_bytes(model, step),
        activation_bytes=_layer_bytes(model, step) + _attention_bytes(model, step),
        # last token's logits in the model's format, and the fp32 copy that sampling reads
        logits_bytes=step.sequences * model.vocab_size * (number_bytes + 4),
        overhead_bytes=overhead_bytes,
    )


def _load_scratch_bytes(model: ModelSpec, execution: Execution) -> int:
    """Weights of another format than the checkpoint's are read into a staging copy each. What
    transformers maps from the file counts nothing: the kernel drops those pages when it must."""
    if model.prequantized or model.dtype == execution.dtype or execution.engine == "transformers":
        return 0
    stored_bytes = DTYPE_BYTES[model.dtype]

    def resident(tensor: TensorSpec) -> int:
        return tensor.elements * DTYPE_BYTES[execution.dtype]

    return load_spike_bytes(model, resident, lambda tensor: tensor.elements * stored_bytes)


def _kv_bytes(model: ModelSpec, step: Step) -> int:
    """What the caches hold: blocks in ullage, exact tensors in transformers; and the state of
    layers that keep one."""
    kv_dtype = step.execution.kv_dtype
    if step.execution.engine == "ullage":
        return step.sequences * sequence_bytes(model, step.held_tokens, kv_dtype)
    # DynamicCache keeps window - 1 entries of a sliding layer: the newest is the query's own.
    numbers = sum(
        cache.width * min(step.held_tokens, (cache.window or step.held_tokens + 1) - 1)
        for cache in model.caches
    )
    return step.sequences * (numbers * DTYPE_BYTES[kv_dtype] + model.state_bytes)


def _layer_bytes(model: ModelSpec, step: Step) -> int:
    """Hidden states of the layer that stands highest; layers run one after the other."""
    hidden, head_dim = model.hidden_size, model.head_dim
    heads, kv_heads = model.num_heads * head_dim, model.num_kv_heads * head_dim
    # alive through all layers: the embedded tokens, and the rotary cosines and sines
    base = hidden + 2 * head_dim
    # layer input and its normed copy; then q, q cos, rotated q and their sum beside k and v
    attention = base + 2 * hidden + 4 * heads + 2 * kv_heads
    # layer input, residual and its normed copy; then, gated, act(gate), up and their product, or,
    # plain, the terms of gelu_new's polynomial
    mlp = base + 3 * hidden + (3 if model.gated_mlp else 4) * model.intermediate_size
    return step.new_tokens * max(attention, mlp) * DTYPE_BYTES[step.execution.dtype]


def _attention_bytes(model: ModelSpec, step: Step) -> int:
    """Scratch of attention beyond its inputs and output, for the layer that takes most."""
    if step.execution.attention == "eager":
        return _eager_bytes(model, step)
    if step.execution.engine == "ullage":
        return _kernel_bytes(model, step)
    return _sdpa_bytes(model, step)


def _eager_bytes(model: ModelSpec, step: Step) -> int:
    """The score matrix, quadratic in the prompt: [heads, N, T] a sequence."""
    number_bytes = DTYPE_BYTES[step.execution.dtype]
    # scores and the softmax in fp32; a narrower format is widened for the softmax and narrowed
    # again
    score_bytes = 4 + 4 if number_bytes == 4 else number_bytes + 4 + 4
    scores = model.num_heads * step.new_tokens * step.held_tokens * score_bytes
    mask = step.new_tokens * step.held_tokens * number_bytes
    return scores + mask + _repeated_kv_bytes(model, step)


def _repeated_kv_bytes(model: ModelSpec, step: Step) -> int:
    """K and V of one layer, repeated to all query heads."""
    if model.num_heads == model.num_kv_heads:
        return 0
    width = 2 * model.num_heads * model.head_dim
    return step.sequences * step.held_tokens * width * DTYPE_BYTES[step.execution.dtype]


def _sdpa_bytes(model: ModelSpec, step: Step) -> int:
    """DynamicCache appends by copying a layer's K, then its V; later chunks need a mask, and with a
    mask K and V are repeated to all query heads."""
    number_bytes = DTYPE_BYTES[step.execution.dtype]
    copied = step.sequences * step.held_tokens * model.kv_width // 2 * number_bytes
    if step.phase == "prefill" and step.new_tokens < step.sequences * step.held_tokens:
        mask = step.new_tokens * step.held_tokens * (1 + number_bytes)
        copied = max(copied, mask + _repeated_kv_bytes(model, step))
    return copied


def _kernel_bytes(model: ModelSpec, step: Step) -> int:
    """ullage's own kernels read the pool where it lies; what they copy is bounded."""
    execution = step.execution
    number_bytes = DTYPE_BYTES[execution.dtype]
    scratch = 0
    if execution.kv_dtype != execution.dtype:
        tile_tokens = min(KV_TILE_TOKENS, step.held_tokens)
        scratch = tile_tokens * model.kv_width * number_bytes
    windows = [window for window in model.windows if window is not None]
    if step.phase == "prefill" and windows:
        # a sliding layer lays its window and the chunk side by side, under a band mask
        span_tokens = min(max(windows), step.held_tokens) + step.new_tokens
        band = span_tokens * (model.kv_width * number_bytes + step.new_tokens * (1 + number_bytes))
        scratch = max(scratch, band)
    return scratch
