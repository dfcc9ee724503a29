"""vLLM: a pool of KV blocks in what its start-up profile leaves of its share of each device."""

from dataclasses import replace

from ullage.errors import InputError
from ullage.planner.constants import Constants, newest_version, version_key
from ullage.planner.engines.base import Planned
from ullage.planner.engines.paging import Paging, Running, paging
from ullage.planner.engines.serving import Serving, weights_terms
from ullage.planner.engines.shards import Stage, stages
from ullage.planner.engines.vllm_peak import peak_terms
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Term
from ullage.specs.plan import DeviceShare, Recipe
from ullage.specs.workload import Execution, Step
from ullage.units import GIB

# Cards whose links go through a switch: collectives among them reserve buffers for multicast.
_SWITCHED = ("h100", "h200", "h20", "h800", "b200", "b300", "gb200", "gb300", "a100")
GRAPH_TOKENS = 512  # the largest step that is captured
_SINCE_INT8_KV = (0, 20)


class Vllm(Serving):
    """`vllm serve`. `prefill_chunk` is its ``--max-num-batched-tokens``."""

    takes_share = True
    # bitsandbytes is gone from the newest version
    weights = tuple(name for name in Serving.weights if name != "nf4")
    kv_dtypes = (*DTYPE_BYTES, "fp8", "int8")

    def defaults(self, device: Device) -> Execution:
        """The server's own, by the device's memory; bf16 whatever the device."""
        if device.memory_bytes >= 160 * GIB:
            chunk_tokens = 16384
        else:
            chunk_tokens = 8192 if _is_large(device) else 2048
        return Execution(engine="vllm", attention="flash", prefill_chunk=chunk_tokens)

    def makes(self, device: Device) -> tuple[str, ...]:
        """What it quantizes to while loading."""
        return (*DTYPE_BYTES, "fp8", "mxfp4")

    def settle(self, recipe: Recipe) -> Recipe:
        """`recipe` with a version, its utilization and its largest number of sequences."""
        execution, constants = super().settle(recipe).execution, Constants(recipe)
        _check(recipe)
        most = 1024 if _is_large(recipe.device) else 256
        return replace(
            recipe,
            execution=replace(
                execution,
                engine_version=execution.engine_version or newest_version("vllm"),
                max_num_seqs=execution.max_num_seqs or min(most, execution.prefill_chunk),
                utilization=execution.utilization or constants["utilization"].value,
            ),
        )

    def limit_bytes(self, recipe: Recipe) -> int:
        """The share of the device that vLLM is told to take."""
        utilization = self.settle(recipe).execution.utilization or 0.0
        return int(recipe.device.memory_bytes * utilization)

    def within(self, recipe: Recipe, budget_bytes: int) -> Recipe:
        """`recipe` with the budget as its share of the device: which rank is the tightest hangs on
        it."""
        memory_bytes, execution = recipe.device.memory_bytes, recipe.execution
        if budget_bytes == int(memory_bytes * (execution.utilization or 0.0)):
            return recipe
        utilization = min(1.0, budget_bytes / memory_bytes)
        return replace(recipe, execution=replace(execution, utilization=utilization))

    def terms(self, recipe: Recipe, step: Step, constants: Constants) -> list[Term]:
        """The rank with the fewest blocks. The profile's peak is reserved whatever the workload."""
        stage = tightest_stage(recipe, constants)
        if step.phase == "load":
            return _loaded_terms(recipe, stage, constants)
        return [*stage_terms(recipe, stage, constants), _kv_term(recipe, step, stage, constants)]

    def share(self, planned: Planned) -> DeviceShare:
        """What the tightest rank holds."""
        recipe, constants = planned.recipe, planned.constants
        stage = tightest_stage(recipe, constants)
        usual = super().share(planned)
        graphs = graph_bytes(recipe, stage, constants)
        inside = graphs if constants["graphs_in_budget"].value else 0
        pages = _paging(recipe, stage)
        tokens, concurrency = _capacity(recipe, pages, usual.kv_pool_bytes, constants)
        return replace(
            usual,
            non_torch_bytes=usual.non_torch_bytes - inside,
            graph_bytes=graphs,
            kv_pool_tokens=tokens,
            max_concurrency=round(concurrency, 2),
        )

    def worst_request_terms(self, recipe: Recipe) -> list[Term]:
        """What single requests take outside of the profile, and so outside of the budget."""
        recipe = self.settle(recipe)
        constants = Constants(recipe)
        model, tokens = recipe.model, recipe.workload.prompt_tokens
        copies = constants["prompt_logprobs_copies"]
        terms = [
            Term(
                "logits",
                "prompt_logprobs of the whole prompt",
                int(tokens * model.vocab_size * 4 * copies.value),
                copies.label,
                f"{tokens:,} tokens x {model.vocab_size:,} x 4 B; {copies.source}",
            )
        ]
        if model.state_bytes:
            scratch = constants["linear_attention_bytes"]
            what = "chunked kernels of the first long prompt"
            terms.append(
                Term("activation", what, int(scratch.value), scratch.label, scratch.source)
            )
        return terms


def tightest_stage(recipe: Recipe, constants: Constants) -> Stage:
    """The rank whose pool has the fewest blocks: all others are cut down to it."""
    found = stages(recipe.model.num_layers, recipe.execution.pipeline_parallel)
    if len(found) == 1:
        return found[0]
    budget_bytes = recipe.device.memory_bytes * (recipe.execution.utilization or 1.0)

    def blocks(stage: Stage) -> float:
        beside_bytes = sum(term.nbytes for term in stage_terms(recipe, stage, constants))
        pool_bytes = budget_bytes - beside_bytes
        return pool_bytes / max(1, _paging(recipe, stage).block_bytes)

    return min(found, key=blocks)


def stage_terms(recipe: Recipe, stage: Stage, constants: Constants) -> list[Term]:
    """What a rank takes inside of the budget, KV entries aside."""
    return [
        *_loaded_terms(recipe, stage, constants),
        *peak_terms(recipe.model, recipe.execution, stage, constants),
        *_graph_terms(recipe, stage, constants),
    ]


def _loaded_terms(recipe: Recipe, stage: Stage, constants: Constants) -> list[Term]:
    """What is there once the weights are."""
    return [*weights_terms(recipe, stage), _non_torch_term(recipe, stage, constants)]


def _non_torch_term(recipe: Recipe, stage: Stage, constants: Constants) -> Term:
    """Device context, libraries and the buffers of collectives."""
    execution = recipe.execution
    if execution.tensor_parallel > 1:
        key = "non_torch_tp_bytes" if _has_switch(recipe.device) else "non_torch_tp_slow_bytes"
    elif execution.pipeline_parallel > 1:
        key = "non_torch_pp_last_bytes" if stage.last else "non_torch_pp_bytes"
    else:
        key = "non_torch_bytes"
    found = constants[key]
    return Term("overhead", "outside of torch", int(found.value), found.label, found.source)


def _graph_terms(recipe: Recipe, stage: Stage, constants: Constants) -> list[Term]:
    """CUDA graphs, in the versions that keep room for them."""
    applied = constants["graphs_in_budget"]
    if not applied.value:
        return []
    nbytes, label = graph_bytes(recipe, stage, constants), constants["graph_layer_bytes"].label
    return [Term("overhead", "CUDA graphs", nbytes, label, applied.source)]


def graph_bytes(recipe: Recipe, stage: Stage, constants: Constants) -> int:
    """What the CUDA graphs of a rank take, by a fit to measured ones."""
    model, execution = recipe.model, recipe.execution
    tokens = min(2 * (execution.max_num_seqs or 1), execution.prefill_chunk, GRAPH_TOKENS)
    inner = model.intermediate_size / execution.tensor_parallel
    numbers = (
        constants["graph_hidden_copies"].value * model.hidden_size
        + constants["graph_inner_copies"].value * inner
    )
    experts = any(tensor.role == "expert" for tensor in model.tensors)
    return int(
        constants["graph_bytes"].value
        + experts * constants["graph_expert_bytes"].value
        + constants["graph_layer_bytes"].value * len(stage.layers)
        + tokens * numbers * 2
    )


def _paging(recipe: Recipe, stage: Stage) -> Paging:
    execution = recipe.execution
    return paging(recipe.model, execution.kv_dtype, execution.tensor_parallel, stage)


def _running(recipe: Recipe, constants: Constants) -> Running:
    steps, states = constants["steps_in_flight"].value, constants["state_blocks"].value
    return Running(recipe.execution.prefill_chunk * int(steps), int(states))


def _kv_term(recipe: Recipe, step: Step, stage: Stage, constants: Constants) -> Term:
    pages = _paging(recipe, stage)
    request_bytes = pages.request_bytes(step.held_tokens, _running(recipe, constants))
    nbytes = step.sequences * request_bytes
    groups = f" in {len(pages.groups)} groups of layers" if len(pages.groups) > 1 else ""
    source = f"{step.sequences:,} x {step.held_tokens:,} tokens in blocks{groups}"
    return Term("kv", f"KV blocks in {step.execution.kv_dtype}", nbytes, "exact", source)


def _capacity(
    recipe: Recipe, pages: Paging, pool_bytes: int, constants: Constants
) -> tuple[int, float]:
    """Tokens and sequences of the planned length in a pool, as the version's log counts them."""
    work, running = recipe.workload, _running(recipe, constants)
    blocks = pages.pool_blocks(pool_bytes)
    concurrency = blocks / max(1, pages.request_blocks(work.context_tokens, running))
    if constants["counts_by_concurrency"].value or not pages.groups:
        return int(concurrency * work.context_tokens), concurrency
    smallest_tokens = min(group.block_tokens for group in pages.groups)
    return blocks // len(pages.groups) * smallest_tokens, concurrency


def _check(recipe: Recipe) -> None:
    execution = recipe.execution
    version = version_key(execution.engine_version or newest_version("vllm"))
    if execution.prefill_chunk < 1:
        raise InputError("vLLM reads prompts in chunks: --prefill-chunk is 1 or more.")
    if (execution.max_num_seqs or 1) > execution.prefill_chunk:
        raise InputError(
            "vLLM wants at least as many tokens in a step as sequences: --prefill-chunk "
            f"{execution.prefill_chunk} is less than {execution.max_num_seqs}."
        )
    if execution.kv_dtype not in Vllm.kv_dtypes:
        raise InputError(
            f"vLLM has no {execution.kv_dtype} KV cache. It has {', '.join(Vllm.kv_dtypes)}."
        )
    if execution.kv_dtype == "int8" and version < _SINCE_INT8_KV:
        raise InputError(f"vLLM {execution.engine_version} has no int8 KV cache: 0.20 has.")
    if execution.utilization is not None and not 0 < execution.utilization <= 1:
        raise InputError("vLLM's utilization is above 0 and at most 1.")


def _is_large(device: Device) -> bool:
    """Whether vLLM takes its larger defaults: 70 GiB and more, but an A100."""
    return device.memory_bytes >= 70 * GIB and "a100" not in device.name.lower()


def _has_switch(device: Device) -> bool:
    return any(name in device.name.lower() for name in _SWITCHED)
