"""How long a plan takes, by roofline: the slowest of moving bytes, computing, launching kernels.

A forward pass reads each weight once (of experts those that its tokens are sent to) and all KV
entries; what a technique moves beside them it says itself. Devices that share a layer share its
bytes and operations, without the traffic between them; a token passes the stages of a pipeline one
after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ullage import techniques
from ullage.planner.constants import latency_constants
from ullage.planner.engines import ENGINES
from ullage.specs.footprint import Footprint
from ullage.specs.latency import Band, Latency
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.workload import PhaseName

# These launch every kernel from Python; the others capture graphs or are compiled.
_EAGER_ENGINES = ("ullage", "transformers")


@dataclass(frozen=True)
class _Work:
    """What something takes of one device: bytes moved, operations, and layers launched."""

    nbytes: float
    operations: float
    launches: int


def estimate(recipe: Recipe, phases: Mapping[PhaseName, Footprint]) -> Latency | None:
    """The latency of `recipe`, settled by its engine, whose peaks are `phases`; None where the
    device's bandwidth or rate is not known."""
    device = recipe.device
    if device.bandwidth_bytes_s is None or device.bf16_flops is None:
        return None
    prefill, decode = _prefill(recipe, phases["prefill"]), _decode(recipe, phases["decode"])
    ttft_s, low_s, high_s = (_seconds(recipe, prefill, end) for end in ("", "_high", "_low"))
    step_s, fast_s, slow_s = (_seconds(recipe, decode, end) for end in ("", "_high", "_low"))
    sequences = recipe.workload.sequences
    return Latency(
        ttft_s=ttft_s,
        sequence_tokens_per_s=1 / step_s,
        tokens_per_s=sequences / step_s,
        ttft_band_s=Band(low_s, high_s),
        tokens_per_s_band=Band(sequences / slow_s, sequences / fast_s),
    )


def _seconds(recipe: Recipe, work: _Work, end: str) -> float:
    """`work` with the utilisation at one end of its band, "" for the likeliest."""
    device = recipe.device
    assert device.bandwidth_bytes_s is not None
    assert device.bf16_flops is not None
    constants = latency_constants(device.kind)
    peak_rate = device.bf16_flops
    if device.fp8_flops and _multiplies_fp8(recipe):
        peak_rate = device.fp8_flops
    rate = peak_rate * constants[f"rate_share{end}"].value
    if (device.kind == "cpu") != (recipe.execution.dtype == "fp32"):
        rate *= constants["other_dtype_share"].value
    launch_s = constants[f"launch_s{end}"].value
    return max(
        work.nbytes / (device.bandwidth_bytes_s * constants[f"bandwidth_share{end}"].value),
        work.operations / rate,
        work.launches * launch_s if recipe.execution.engine in _EAGER_ENGINES else 0.0,
    )


def _multiplies_fp8(recipe: Recipe) -> bool:
    """Whether matrices are multiplied in fp8: by servers, of a checkpoint that holds them so."""
    storages = (tensor.storage for tensor in recipe.model.tensors if tensor.role == "linear")
    fp8 = any(storage is not None and storage.name == "fp8" for storage in storages)
    return fp8 and recipe.execution.engine in ("vllm", "sglang")


def _decode(recipe: Recipe, footprint: Footprint) -> _Work:
    """One token for each sequence, all of them at their full length."""
    model, work, execution = recipe.model, recipe.workload, recipe.execution
    nbytes = _weights_read_bytes(recipe, footprint, work.sequences, "decode") + footprint.kv_bytes
    seen = _seen_tokens(model, work.context_tokens) - _seen_tokens(model, work.context_tokens - 1)
    operations = work.sequences * (2 * model.active_parameters + _score_operations(model, seen))
    return _Work(
        nbytes * execution.pipeline_parallel,
        operations / execution.tensor_parallel,
        model.num_layers,
    )


def _prefill(recipe: Recipe, footprint: Footprint) -> _Work:
    """One prompt, in its chunks; each reads the KV entries that there are by then."""
    model, work, execution = recipe.model, recipe.workload, recipe.execution
    chunk_tokens = min(execution.prefill_chunk or work.prompt_tokens, work.prompt_tokens)
    chunks = -(-work.prompt_tokens // chunk_tokens)
    kv_bytes = footprint.kv_bytes / work.sequences / 2
    nbytes = chunks * (_weights_read_bytes(recipe, footprint, chunk_tokens, "prefill") + kv_bytes)
    seen = _seen_tokens(model, work.prompt_tokens)
    operations = 2 * model.active_parameters * work.prompt_tokens + _score_operations(model, seen)
    return _Work(
        nbytes * execution.pipeline_parallel,
        operations / execution.tensor_parallel,
        chunks * model.num_layers,
    )


def _weights_read_bytes(
    recipe: Recipe, footprint: Footprint, tokens: int, phase: PhaseName
) -> float:
    """Bytes of weights that a pass of `tokens` reads on one device, and what techniques move."""
    model, execution = recipe.model, recipe.execution
    read_bytes = footprint.weights_bytes * _read_share(model, execution.dtype, tokens)
    step = ENGINES[execution.engine].step(recipe, phase)
    chosen = map(techniques.create, recipe.techniques)
    moved = sum(technique.moved_bytes(model, step, recipe.device) for technique in chosen)
    return read_bytes + moved / execution.tensor_parallel / execution.pipeline_parallel


def _read_share(model: ModelSpec, dtype: str, tokens: int) -> float:
    """Of all weights, the share that `tokens` need: a token that is sent to k of n experts leaves
    any one of them alone with probability 1 - k/n."""
    idle_bytes = sum(
        tensor.stored_bytes(dtype) * tensor.count * (1 - tensor.active / tensor.copies) ** tokens
        for tensor in model.tensors
        if tensor.active is not None
    )
    return 1 - idle_bytes / model.weights_bytes(dtype) if idle_bytes else 1.0


def _seen_tokens(model: ModelSpec, tokens: int) -> float:
    """Pairs of a token and one that it attends to, over all layers, in a text of `tokens`."""
    return sum(
        count * (tokens * kept - kept * kept / 2)
        for cache, count in model.cache_kinds
        if cache.width and (kept := cache.kept_tokens(tokens))
    )


def _score_operations(model: ModelSpec, pairs: float) -> float:
    """Operations of attention for that many pairs: queries times keys, scores times values."""
    return 4 * model.num_heads * model.head_dim * pairs
