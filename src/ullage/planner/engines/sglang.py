"""SGLang: weights and KV pool in a fixed share of each device; the rest is left to activations."""

from dataclasses import replace

from ullage.errors import InputError
from ullage.planner.constants import Constants
from ullage.planner.engines.base import Planned
from ullage.planner.engines.serving import Serving, weights_terms
from ullage.planner.engines.shards import Stage, stages
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES, KV_BITS
from ullage.specs.footprint import Term
from ullage.specs.model import LayerCache
from ullage.specs.plan import DeviceShare, Recipe
from ullage.specs.workload import Execution, Step
from ullage.units import GIB, MIB

SLIDING_PART = 0.8  # --swa-full-tokens-ratio
# Memory in GiB below which a device gets a chunk of so many tokens, and graphs for so many
# sequences, with fewer than four devices and with more.
_TIERS = (
    (20, 2048, 8, 8),
    (35, 4096, 48, 160),
    (60, 4096, 32, 160),
    (90, 8192, 256, 512),
    (160, 8192, 256, 512),
    (1 << 20, 16384, 512, 512),
)
# Steps between the token counts that prefill graphs are captured for, up to the second number.
_GRAPH_STEPS = ((4, 32), (16, 256), (32, 512), (64, 1024), (256, 4096), (512, 1 << 20))


class Sglang(Serving):
    """`python -m sglang.launch_server`. `utilization` is its ``--mem-fraction-static``,
    `prefill_chunk` its ``--chunked-prefill-size``."""

    takes_share = True
    kv_dtypes = (*DTYPE_BYTES, "fp8")

    def defaults(self, device: Device) -> Execution:
        """A chunk by the device's memory."""
        chunk_tokens = _tier(device)[1]
        return Execution(engine="sglang", attention="flash", prefill_chunk=chunk_tokens)

    def makes(self, device: Device) -> tuple[str, ...]:
        """What it quantizes to while loading; bitsandbytes is CUDA's."""
        made = (*DTYPE_BYTES, "fp8")
        return (*made, "nf4") if device.kind == "cuda" else made

    def settle(self, recipe: Recipe) -> Recipe:
        """`recipe` with the share of the device that weights and KV entries get."""
        execution = super().settle(recipe).execution
        if execution.prefill_chunk < 1:
            raise InputError("SGLang's plan wants prompts in chunks: --prefill-chunk is 1 or more.")
        if execution.kv_dtype not in self.kv_dtypes:
            known = ", ".join(self.kv_dtypes)
            raise InputError(f"SGLang has no {execution.kv_dtype} KV cache. It has {known}.")
        if execution.utilization is not None and not 0 < execution.utilization <= 1:
            raise InputError("SGLang's static fraction of memory is above 0 and at most 1.")
        graphs = (
            execution.max_num_seqs
            or _tier(recipe.device)[2 if execution.tensor_parallel < 4 else 3]
        )
        sized = replace(recipe, execution=replace(execution, max_num_seqs=graphs))
        fraction = execution.utilization or _static_fraction(sized)
        return replace(sized, execution=replace(sized.execution, utilization=fraction))

    def limit_bytes(self, recipe: Recipe) -> int:
        """The static share."""
        utilization = self.settle(recipe).execution.utilization or 0.0
        return int(recipe.device.memory_bytes * utilization)

    def terms(self, recipe: Recipe, step: Step, constants: Constants) -> list[Term]:
        """What lies in the static share of the fullest rank. Activations and graphs do not: see
        `share`."""
        ranks = stages(recipe.model.num_layers, recipe.execution.pipeline_parallel)
        found = [_stage_terms(recipe, step, stage, constants) for stage in ranks]
        return max(found, key=lambda terms: sum(term.nbytes for term in terms))

    def share(self, planned: Planned) -> DeviceShare:
        """Activations have what the static share and the graphs leave of the device."""
        graphs = int(_graph_mib(planned.recipe, planned.constants) * MIB)
        rest_bytes = planned.recipe.device.memory_bytes - planned.budget_bytes - graphs
        return replace(
            super().share(planned), activation_bytes=max(0, rest_bytes), graph_bytes=graphs
        )


def _tier(device: Device) -> tuple[int, int, int, int]:
    return next(tier for tier in _TIERS if device.memory_bytes < tier[0] * GIB)


def _static_fraction(recipe: Recipe) -> float:
    """The default: all but a reserve for activations, parallel buffers and graphs.

    Raises:
        InputError: nothing is left.
    """
    execution, constants = recipe.execution, Constants(recipe)
    reserved_mib = (
        constants["reserved_mib"].value
        + constants["reserved_token_mib"].value * max(execution.prefill_chunk, 2048)
        + constants["reserved_device_mib"].value
        * execution.tensor_parallel
        * execution.pipeline_parallel
        + _graph_mib(recipe, constants)
    )
    memory_mib = recipe.device.memory_bytes / MIB
    if memory_mib > constants["large_mib"].value:
        reserved_mib = max(reserved_mib, constants["large_reserved_mib"].value)
    fraction = round((memory_mib - reserved_mib) / memory_mib, 3)
    if fraction <= 0:
        raise InputError(
            f"SGLang keeps {reserved_mib:,.0f} MiB for activations, more than the device has: "
            "a smaller --prefill-chunk or --max-num-seqs makes it less."
        )
    return fraction


def _graph_mib(recipe: Recipe, constants: Constants) -> float:
    """What is kept for CUDA graphs of decoding and of prefill."""
    execution = recipe.execution
    sizes = _graph_sizes(execution.prefill_chunk)
    decode = constants["graph_sequence_mib"].value * (execution.max_num_seqs or 0)
    return decode + constants["graph_prefill_mib"].value * sizes


def _graph_sizes(chunk_tokens: int) -> int:
    """How many token counts prefill graphs are captured for."""
    count = last = 0
    for step, end in _GRAPH_STEPS:
        count += max(0, min(end, chunk_tokens) - last) // step
        last = end
    return count


def _stage_terms(recipe: Recipe, step: Step, stage: Stage, constants: Constants) -> list[Term]:
    terms = [*weights_terms(recipe, stage), _context_term(recipe, constants)]
    return terms if step.phase == "load" else [*terms, _kv_term(recipe, step, stage)]


def _context_term(recipe: Recipe, constants: Constants) -> Term:
    """Memory that is gone before weights are loaded: SGLang takes its share of what is left."""
    key = "context_tp_bytes" if recipe.execution.tensor_parallel > 1 else "context_bytes"
    context = constants[key]
    nbytes = int(context.value * (recipe.execution.utilization or 1.0))
    return Term("overhead", "device context", nbytes, context.label, context.source)


def _kv_term(recipe: Recipe, step: Step, stage: Stage) -> Term:
    """A token pool without blocks; sliding layers have a pool of their own, a part of the other's
    size, and states one slot a sequence."""
    caches = [recipe.model.caches[layer] for layer in stage.layers]
    hybrid = len({cache.window is None for cache in caches if cache.width}) > 1
    each_bytes = sum(_token_bytes(cache, step, hybrid) for cache in caches)
    split = step.execution.tensor_parallel
    state_bytes = sum(-(-cache.state_bytes // split) for cache in caches)
    nbytes = step.sequences * int(step.held_tokens * each_bytes + state_bytes)
    source = f"{step.sequences:,} x {step.held_tokens:,} tokens"
    return Term("kv", f"KV pool in {step.execution.kv_dtype}", nbytes, "exact", source)


def _token_bytes(cache: LayerCache, step: Step, hybrid: bool) -> float:
    numbers = cache.split_width(step.execution.tensor_parallel)
    part = SLIDING_PART if hybrid and cache.window is not None else 1.0
    return part * numbers * KV_BITS[step.execution.kv_dtype] / 8
