"""llama.cpp: ``llama-server``."""

import re
import shlex

from ullage.errors import InputError
from ullage.exporters.shared import plans, text
from ullage.exporters.shared.options import Option, known
from ullage.specs.gguf_quant import is_gguf
from ullage.specs.plan import Plan

_PLAIN_TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_CONVERTED = ("f32", "f16", "bf16", "mxfp4")  # what the converter writes, or leaves as it is
_LOGICAL_BATCH_TOKENS = 2048  # llama.cpp's own; a larger physical batch needs a larger one


def export(plan: Plan) -> str:
    """The command that serves the plan.

    Raises:
        InputError: something that llama.cpp does not have.
    """
    plans.refuse_others(plan, "llama.cpp", "cuda", "rocm", "mps", "cpu")
    plans.refuse_scheme(plan, known("llama.cpp"))
    weights = plans.weights_of(plan.recipe.model)
    notes = plans.notes_of(plan, known("llama.cpp"))
    ready = weights.gguf and not plan.recipe.model.converted
    file, conversion = (weights.name, []) if ready else _converted(plan)
    options = [
        Option("--model", file, "the weights"),
        *_sizes(plan),
        *_formats(plan),
        *_devices(plan),
    ]
    return text.shell([*notes, *conversion], [], ["llama-server"], options)


def _converted(plan: Plan) -> tuple[str, list[str]]:
    """The GGUF file that has to be made first, and how.

    Raises:
        InputError: a checkpoint of which none can be made.
    """
    model = plan.recipe.model
    folder, kind = shlex.quote(plans.weights_of(model).name), _file_type(plan)
    stem = re.sub(r"[^\w.-]+", "-", model.name, flags=re.ASCII).strip("-.") or "model"
    file = f"{stem}-{kind}.gguf"
    if plans.weights_of(model).gguf:
        return file, [f"llama-quantize --allow-requantize {folder} {file} {_mixture(kind)}"]
    made = kind == "mxfp4" and model.converted
    whole = file if kind in _CONVERTED and not made else f"{stem}-bf16.gguf"
    outtype = kind if kind in _PLAIN_TYPES.values() else "bf16"
    lines = [
        f"It reads GGUF: convert_hf_to_gguf.py {folder} --outtype {outtype} --outfile {whole} "
        "(a hub id: with --remote)"
    ]
    if whole != file:
        lines.append(f"then llama-quantize {whole} {file} {_mixture(kind)}")
    return file, lines


def _mixture(kind: str) -> str:
    """As llama-quantize spells it."""
    return "MXFP4_MOE" if kind == "mxfp4" else kind.upper()


def _file_type(plan: Plan) -> str:
    """The file's type: the mixture that was planned, or else that of most weights."""
    model, dtype = plan.recipe.model, plan.recipe.execution.dtype
    stored = model.stored_formats
    if not plans.gguf_types(model) or (model.converted and not is_gguf(model)):
        raise InputError(
            f"llama.cpp reads no {stored[0]} checkpoint: plan with --engine llama.cpp "
            "--weights q4_k_m, or a .gguf file."
        )
    plans.torch_dtype(dtype)  # an error of ours, if it is none
    kind = model.converted or (stored[0] if stored else dtype)
    return _PLAIN_TYPES.get(kind, kind)


def _sizes(plan: Plan) -> list[Option]:
    work, execution = plan.recipe.workload, plan.recipe.execution
    chunk_tokens = execution.prefill_chunk or work.prompt_tokens
    why = "prompt tokens a step" if execution.prefill_chunk else "a whole prompt in one step"
    return [
        Option(
            "--ctx-size",
            work.context_tokens * work.sequences,
            f"{work.context_tokens:,} tokens for each of {work.sequences:,} slots"
            if work.sequences > 1
            else f"{work.context_tokens:,} tokens for the only slot",
        ),
        Option("--parallel", work.sequences, "slots: sequences at the same time"),
        Option("--ubatch-size", chunk_tokens, why),
        Option(
            "--batch-size",
            max(chunk_tokens, _LOGICAL_BATCH_TOKENS),
            "no smaller than --ubatch-size",
        ),
    ]


def _formats(plan: Plan) -> list[Option]:
    execution = plan.recipe.execution
    kv_type = _PLAIN_TYPES.get(execution.kv_dtype, execution.kv_dtype)
    eager = execution.attention == "eager"
    if eager and kv_type not in _PLAIN_TYPES.values():
        raise InputError("llama.cpp quantizes V only with flash attention: plan without eager.")
    why = f"{plan.kv_bytes_per_token:,} bytes of KV a token"
    return [
        Option("--cache-type-k", known("llama.cpp").choice("--cache-type-k", kv_type), why),
        Option("--cache-type-v", known("llama.cpp").choice("--cache-type-v", kv_type), why),
        Option(
            "--flash-attn",
            "off" if eager else "on",
            "the score matrix is planned" if eager else "no score matrix is planned",
        ),
    ]


def _devices(plan: Plan) -> list[Option]:
    execution, kind = plan.recipe.execution, plan.recipe.device.kind
    tensor, pipeline = execution.tensor_parallel, execution.pipeline_parallel
    if tensor > 1 and pipeline > 1:
        raise InputError("llama.cpp splits layers or the stack, not both: plan --tp or --pp.")
    options = [Option("--fit", "off", "the plan decides, so nothing is to be adjusted")]
    if kind == "cpu":
        none, why = Option("--gpu-layers", 0, "as planned, all on the CPU"), "prompts kept in RAM"
        return [*options, none, Option("--cache-ram", 0, f"{why} are not in the plan")]
    options.append(Option("--gpu-layers", "all", "as planned, all on the device"))
    if tensor * pipeline > 1:
        mode, why = ("tensor", "each layer") if tensor > 1 else ("layer", "the stack")
        devices = tensor * pipeline
        options.append(Option("--split-mode", mode, f"{devices} devices share {why}"))
        options.append(Option("--tensor-split", ",".join("1" * devices), "equal shares"))
    return options
