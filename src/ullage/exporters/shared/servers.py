"""What vLLM and SGLang have in common, each with its own words for it."""

from collections.abc import Mapping

from ullage.exporters.shared import plans
from ullage.exporters.shared.options import Known, Option
from ullage.specs.plan import Plan


def notes(plan: Plan, known: Known, server: str) -> list[str]:
    """What no option of `server`, as it is written, says."""
    model, lines = plan.recipe.model, plans.notes_of(plan, known)
    stored = model.stored_formats
    if stored and not model.converted and not plans.weights_of(model).gguf:
        lines.append(
            f"{', '.join(stored)} weights: {server} reads that from the checkpoint's config."
        )
    if plan.recipe.execution.attention == "eager":
        lines.append(f"{server} has no eager attention: its kernels build no score matrix.")
    if plans.fraction_of(plan, plan.budget_bytes) is None:
        lines.append(f"Planned with the whole device: {server} takes its own default share of it.")
    return lines


def environment(plan: Plan, but: str = "") -> list[Option]:
    """Environment variables; `but` says where they are to be left out."""
    if plan.recipe.device.kind != "cuda":
        return []
    why = f"freed memory of one size serves another{but}"
    return [Option("PYTORCH_ALLOC_CONF", "expandable_segments:True", why)]


def formats(plan: Plan, known: Known, kv_dtypes: Mapping[str, str]) -> list[Option]:
    """The formats of the arithmetic and of KV entries, which the server calls `kv_dtypes`.

    Raises:
        InputError: one that it does not have.
    """
    execution = plan.recipe.execution
    dtype = known.choice("--dtype", plans.torch_dtype(execution.dtype))
    kv_dtype = kv_dtypes.get(execution.kv_dtype, execution.kv_dtype)
    if execution.kv_dtype == execution.dtype and kv_dtype not in kv_dtypes.values():
        kv_dtype = "auto"  # as the arithmetic: there is no other name for it
    return [
        Option("--dtype", dtype, "unquantized weights and the arithmetic"),
        Option(
            "--kv-cache-dtype",
            known.choice("--kv-cache-dtype", kv_dtype),
            f"{plan.kv_bytes_per_token:,} bytes of KV a token in {execution.kv_dtype}",
        ),
    ]


def devices(plan: Plan, tensor: str, pipeline: str) -> list[Option]:
    """How many devices share the model, by the options called `tensor` and `pipeline`."""
    execution = plan.recipe.execution
    counts = (
        Option(tensor, execution.tensor_parallel, "devices that share each layer"),
        Option(pipeline, execution.pipeline_parallel, "devices that share the stack"),
    )
    return [option for option in counts if option.value != 1]
