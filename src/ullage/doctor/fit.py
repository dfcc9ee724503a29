"""What the planner says of the run that a log describes. Nothing outside of the catalog is read:
a log may name any path."""

from dataclasses import replace
from typing import get_args

from ullage.doctor.diagnosis import Change, Diagnosis
from ullage.doctor.weights import model_of, with_weights
from ullage.errors import InputError, UllageError
from ullage.planner import build_plan, default_execution
from ullage.planner.engines import ENGINES
from ullage.specs.device import Device, find_device
from ullage.specs.dtypes import dtype_name, kv_dtype_name
from ullage.specs.plan import Plan, Recipe
from ullage.specs.workload import Engine, Execution, Workload
from ullage.units import GIB, format_bytes

_OUTPUT_TOKENS = 256
_FLAGS = {"vllm": "--max-model-len", "sglang": "--context-length", "llama.cpp": "-c"}
_LENGTH = tuple(f"{flag} " for flag in _FLAGS.values())
_MOST = 1 << 30  # no engine counts more tokens or sequences: such a log is not to be believed


def with_plan(diagnosis: Diagnosis) -> Diagnosis:
    """The diagnosis with what the plan says, or why there is none, if the log names a known model,
    device and engine."""
    try:
        plan = _plan(diagnosis)
    except UllageError as error:
        return replace(diagnosis, planned=f"No plan: {error}")
    if plan is None:
        return diagnosis
    changes = diagnosis.changes
    if diagnosis.engine == "llama.cpp" and diagnosis.wanted_bytes:
        changes = tuple(_no_longer(change, plan) for change in changes)
    if diagnosis.failed and not any(change.flags.startswith(_LENGTH) for change in changes):
        changes += _shorter(plan)
    return replace(diagnosis, planned=_sentence(plan), changes=changes)


def plan_of(diagnosis: Diagnosis) -> Plan | None:
    """The plan of the run that the log describes, or None where it does not say enough."""
    try:
        return _plan(diagnosis)
    except UllageError:
        return None


def _plan(diagnosis: Diagnosis) -> Plan | None:
    """The plan, or None where the log does not say enough for one.

    Raises:
        UllageError: it says enough, but what it says has no plan.
    """
    if diagnosis.engine not in get_args(Engine):
        return None
    recipe = _recipe(diagnosis)
    return None if recipe is None else build_plan(recipe)


def _recipe(diagnosis: Diagnosis) -> Recipe | None:
    run = diagnosis.run
    model = model_of(run.model, run.quantization)
    sizes = (run.max_model_len or 2, run.max_num_seqs or 1, run.prefill_chunk or 1,
             run.tensor_parallel, run.pipeline_parallel)  # fmt: skip
    device = _device(diagnosis)
    if model is None or device is None or max(sizes) > _MOST:
        return None
    length = max(2, run.max_model_len or model.max_context_tokens)
    output = min(_OUTPUT_TOKENS, length // 2)
    work = Workload(length - output, output)
    # A GGUF file has a type of its own: where the log does not tell it, there is nothing to plan.
    if diagnosis.engine == "llama.cpp" and not run.quantization:
        return None
    recipe = Recipe(model, device, work, _execution(diagnosis, device))
    return with_weights(recipe, run.quantization, run.model)


def _device(diagnosis: Diagnosis) -> Device | None:
    """The device that is named, or one of the log's size; the log's own size goes first."""
    total_bytes = diagnosis.total_bytes
    if diagnosis.device:
        named = find_device(diagnosis.device)
        return replace(named, memory_bytes=total_bytes or named.memory_bytes)
    if not total_bytes:
        return None
    return Device(f"the log's {total_bytes / GIB:.2f} GiB device", "cuda", total_bytes)


def _execution(diagnosis: Diagnosis, device: Device) -> Execution:
    run, engine = diagnosis.run, diagnosis.engine
    default = default_execution(device, engine)  # type: ignore[arg-type]
    kv_dtype = kv_dtype_name(run.kv_dtype) if run.kv_dtype else default.kv_dtype
    if kv_dtype is None or kv_dtype not in ENGINES[default.engine].kv_dtypes:
        raise InputError(f"there is no arithmetic for {run.kv_dtype[:40]} KV entries in {engine}.")
    return replace(
        default,
        dtype=dtype_name(run.dtype) or default.dtype,
        kv_dtype=kv_dtype,
        prefill_chunk=run.prefill_chunk or default.prefill_chunk,
        engine_version=diagnosis.engine_version,
        max_num_seqs=run.max_num_seqs,
        utilization=run.utilization,
        tensor_parallel=run.tensor_parallel,
        pipeline_parallel=run.pipeline_parallel,
    )


def _sentence(plan: Plan) -> str:
    model = plan.recipe.model
    weights = f" in {model.converted}" if model.converted else ""
    return f"By the plan, {model.name}{weights} {_pool(plan)}"


def _pool(plan: Plan) -> str:
    """What of KV entries there is room for: nothing, less than was asked for, or so many times
    that."""
    share, work, longest = plan.share, plan.recipe.workload, plan.cliff.max_model_len
    if longest == 0:
        return "leaves nothing for KV entries."
    most = f"the longest that fits has {'any' if longest is None else f'{longest:,}'} tokens."
    pool = format_bytes(share.kv_pool_bytes)
    if not plan.fits and share.max_concurrency >= 1:  # a pool that is asked for, not what is left
        return (
            f"wants {pool} of KV entries for {work.context_tokens:,} tokens, which do not fit; "
            f"{most}"
        )
    return (
        f"leaves {pool} for KV entries: {share.max_concurrency:,.2f} requests of "
        f"{work.context_tokens:,} tokens at once; {most}"
    )


def _no_longer(change: Change, plan: Plan) -> Change:
    """llama.cpp fails before its log has the compute buffer, which the plan counts."""
    flag, _, tokens = change.flags.partition(" ")
    longest = plan.cliff.max_model_len
    if flag != "-c" or not longest or int(tokens) <= longest:
        return change
    return next(iter(_shorter(plan)), change)


def _shorter(plan: Plan) -> tuple[Change, ...]:
    longest, asked = plan.cliff.max_model_len, plan.recipe.workload.context_tokens
    if not longest or longest >= asked:
        return ()
    flag = _FLAGS.get(plan.recipe.execution.engine, "--max-model-len")
    return (Change(f"{flag} {longest}", "the longest request that fits by the plan"),)
