"""A plan as an exporter reads it: where the weights are, their format, and the share of memory."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ullage.errors import InputError
from ullage.exporters.shared.options import Known
from ullage.exporters.shared.text import writable
from ullage.planner.engines import ENGINES
from ullage.specs.device import Device, DeviceKind
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan
from ullage.units import format_bytes

FRACTION_STEPS = 10_000  # a share of memory is written with four digits

_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)", re.ASCII)
_GGUF_TYPE = re.compile(r"i?q\d\w*|tq\d\w*|f16|f32|bf16|mxfp4")
_BITSANDBYTES = ("nf4", "fp4")


@dataclass(frozen=True)
class Weights:
    """Where the weights are: a hub id with perhaps a revision, a folder, or a GGUF file. Where the
    plan names none, `name` is the model's and `unknown` is set."""

    name: str
    revision: str | None = None
    gguf: bool = False
    unknown: bool = False


def weights_of(model: ModelSpec) -> Weights:
    """Where the plan's weights are.

    Raises:
        InputError: a name that cannot be written down.
    """
    source = writable(model.source, "model's source")
    if not source or source.startswith("package:"):
        return Weights(_no_option(writable(model.name, "model's name")), unknown=True)
    if source.lower().endswith(".gguf"):
        return Weights(_no_option(source), gguf=True)
    pinned = _HUB_ID.fullmatch(source)
    if pinned is not None:
        return Weights(_no_option(pinned["repo"]), pinned["revision"])
    return Weights(_no_option(source))


def _no_option(name: str) -> str:
    """A path that begins with a hyphen would be read as an option."""
    return f"./{name}" if name.startswith("-") else name


def torch_dtype(dtype: str) -> str:
    """How torch calls a format of the arithmetic.

    Raises:
        InputError: the arithmetic of no engine is in it.
    """
    if dtype not in _TORCH_DTYPES:
        raise InputError(f"No engine computes in {dtype!r}: {', '.join(_TORCH_DTYPES)}.")
    return _TORCH_DTYPES[dtype]


def scheme_of(plan: Plan) -> str:
    """What the weights are quantized to while they are loaded: none, int8 or nf4."""
    for choice in plan.recipe.techniques:
        if choice.name == "quantization":
            return str(choice.settings.get("scheme", "int8"))
    return "none"


def gguf_types(model: ModelSpec) -> bool:
    """Whether every quantized weight is of a type that GGUF has."""
    return all(_GGUF_TYPE.fullmatch(name) for name in model.stored_formats)


def refuse_gguf_types(plan: Plan, engine: str) -> None:
    """Refuse weights in llama.cpp's own types.

    Raises:
        InputError: there are some.
    """
    own = [name for name in plan.recipe.model.stored_formats if name != "mxfp4"]
    for name in own:
        if _GGUF_TYPE.fullmatch(name):
            raise InputError(
                f"{engine} has no {name} weights, which are llama.cpp's: plan with "
                f"--engine {engine}, or export to llama.cpp."
            )


def refuse_scheme(plan: Plan, known: Known) -> None:
    """Refuse weights that are quantized while they are loaded, by bitsandbytes or torchao.

    Raises:
        InputError: they are.
    """
    if scheme_of(plan) != "none":
        raise _no_weights(known, scheme_of(plan))


def refuse_bitsandbytes(plan: Plan, known: Known) -> None:
    """Refuse checkpoints that only bitsandbytes reads.

    Raises:
        InputError: it is one.
    """
    for name in plan.recipe.model.stored_formats:
        if name in _BITSANDBYTES:
            raise _no_weights(known, name)


def refuse_converted(plan: Plan, known: Known, makes: Iterable[str] = ()) -> None:
    """Refuse a format that the plan gave to plain weights, but for those that the engine `makes`
    itself: what lies at the model's source would be served as it is.

    Raises:
        InputError: it is such a format.
    """
    model = plan.recipe.model
    if not model.converted or (model.converted in makes and not weights_of(model).gguf):
        return
    own = f", or choose what it makes itself: --weights {' or '.join(makes)}" if makes else ""
    raise InputError(
        f"{known.engine} {known.version} makes no {model.converted} weights of a plain checkpoint: "
        f"name one that has them, as in `ullage plan ORG/NAME-{model.converted}`{own}."
    )


def _no_weights(known: Known, name: str) -> InputError:
    other = "q8_0 or q4_k_m" if known.engine == "llama.cpp" else "fp8 or w4a16"
    return InputError(
        f"{known.engine} {known.version} has no {name} weights: plan a checkpoint in {other}, or "
        "run this plan in ullage or transformers."
    )


def refuse_others(plan: Plan, engine: str, *kinds: DeviceKind) -> None:
    """Refuse techniques that no other engine has, and devices that are none of `kinds`.

    Raises:
        InputError: the plan asks for one.
    """
    for choice in plan.recipe.techniques:
        if choice.name != "quantization":
            raise InputError(
                f"{engine} has no {choice.name[:60]!r}: plan without it, or run it in ullage."
            )
    device = plan.recipe.device
    if device.kind not in kinds:
        raise InputError(f"{engine} does not run on {device.name[:60]!r} ({device.kind}).")


def notes_of(plan: Plan, known: Known) -> list[str]:
    """What a reader has to know of the plan before using it."""
    recipe, work, execution = plan.recipe, plan.recipe.workload, plan.recipe.execution
    engine = " ".join(filter(None, (execution.engine, execution.engine_version)))
    lines = [
        f"{recipe.model.name} on {recipe.device.name}: {work.sequences:,} x "
        f"({work.prompt_tokens:,} prompt + {work.output_tokens:,} output tokens).",
        f"Planned for {engine}: peak {format_bytes(plan.peak_bytes)} of "
        f"{format_bytes(plan.budget_bytes)} a device. Written for {known.engine} {known.version}.",
    ]
    if not plan.fits:
        lines.append("WARNING: this plan does not fit its budget.")
    if recipe.beyond_context:
        lines.append(
            f"WARNING: {work.context_tokens:,} tokens are beyond the model's own context of "
            f"{recipe.model.max_context_tokens:,}: {known.engine} refuses or misreads them."
        )
    if execution.engine != known.engine:
        counted = f" `ullage plan --engine {known.engine}` counts them."
        lines.append(
            f"The figures are those of {execution.engine}: {known.engine} holds other things "
            f"beside weights and KV.{counted if _plannable(known.engine, recipe.device) else ''}"
        )
    if weights_of(recipe.model).unknown:
        lines.append("The plan names no weights: put their hub id or path for the model's name.")
    return lines


def _plannable(engine: str, device: Device) -> bool:
    return any(name == engine and device.kind in one.kinds for name, one in ENGINES.items())


def fraction_of(plan: Plan, nbytes: int) -> float | None:
    """`nbytes` as a share of the device, rounded so that it takes no byte more; None where the
    budget is the whole device, which no engine can have."""
    memory_bytes = plan.recipe.device.memory_bytes
    if plan.budget_bytes >= memory_bytes:
        return None
    steps = round(nbytes * FRACTION_STEPS / memory_bytes)
    if steps * memory_bytes // FRACTION_STEPS > nbytes:
        steps -= 1
    return max(1, steps) / FRACTION_STEPS


def no_graphs(plan: Plan, engine: str) -> bool:
    """Whether a plan of this very engine has no CUDA graphs; another's says nothing of them."""
    recipe = plan.recipe
    own = recipe.execution.engine == engine and recipe.device.kind != "cpu"
    return own and plan.share.graph_bytes == 0
