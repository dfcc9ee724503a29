"""A model as planned: its weights in their format, on their device, its techniques attached."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ullage import techniques
from ullage.errors import CheckpointError, TechniqueError
from ullage.kv import attention
from ullage.runtime.budget import refuse_crowded, refuse_misfit
from ullage.runtime.memory import held_bytes, wall
from ullage.runtime.reader import Progress, Reader
from ullage.runtime.rope import settle_rope
from ullage.specs.plan import Plan, Recipe
from ullage.specs.sources import read_config
from ullage.techniques.base import Technique
from ullage.techniques.quantization.linear import tensor_bytes
from ullage.techniques.tokenizer import shared_tokenizer

TORCH_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, with ullage's attention."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    max_tokens: int | None = None  # of a sequence, by its rotary frequencies; None: any number
    attached: ExitStack = field(default_factory=ExitStack)  # techniques, until `close`

    def nbytes(self) -> int:
        """Bytes of the weights as they are, quantized ones with their scales."""
        return sum(tensor_bytes(parameter) for parameter in self.model.parameters())

    def close(self) -> None:
        """Detach what is attached: the model is as it was read, what was converted on its way in
        excepted."""
        self.attached.close()

    def without_end(self) -> "LoadedModel":
        """The same model, for which no token ends a text."""
        return replace(self, eos_token_ids=frozenset())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        CheckpointError: there is none that can be read, or it is code in the folder itself.
    """
    config = folder / "tokenizer_config.json"
    if config.exists() and read_config(config).get("auto_map"):
        raise CheckpointError(
            "The tokenizer is code in the model's own repository (trust_remote_code), which ullage "
            "never executes."
        )
    try:
        return shared_tokenizer(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} holds no readable tokenizer: {_one_line(error)}"
        ) from error


def load_model(
    plan: Plan,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """The model in `folder` as `plan` says: format, techniques, device. Whatever can be refused is
    refused before a weight is read.

    Raises:
        DoesNotFit: the plan's peak is above its budget.
        BudgetExceeded: this process holds more than the plan leaves for the runtime.
        TechniqueError: a technique that cannot act on this model, or is planned only.
        CheckpointError: weights that are missing, unknown, misshapen or truncated.
    """
    recipe = plan.recipe
    refuse_misfit(plan)
    chain = attachable(recipe)
    attention.register()
    dtype, device = TORCH_DTYPES[recipe.execution.dtype], device_of(recipe)
    model = _skeleton(folder, dtype)
    conversions, others = _conversions(chain, model)
    reader = Reader(model, dtype, device, conversions)
    refuse_crowded(plan, held_bytes(device))
    wall(device, plan.budget_bytes)
    reader.read(folder, on_progress)
    model.eval().set_attn_implementation(attention.NAME)
    max_tokens = settle_rope(model, recipe.workload.context_tokens)
    ends = _eos_token_ids(model, folder)
    with ExitStack() as stack:
        for technique in others:
            stack.enter_context(technique.attach(model))
        return LoadedModel(model, tokenizer, ends, max_tokens, stack.pop_all())


def attachable(recipe: Recipe) -> list[Technique]:
    """The recipe's techniques, in its order.

    Raises:
        TechniqueError: one that cannot act on this model, or is planned only.
    """
    chain = [techniques.create(choice) for choice in recipe.techniques]
    for technique in chain:
        reason = technique.unsupported(recipe.model)
        if not technique.runs:
            reason = "its bytes can be planned, and that is all yet."
        if reason is not None:
            raise TechniqueError(f"{technique.name} cannot act on {recipe.model.name}: {reason}")
    return chain


def _conversions(
    chain: list[Technique], model: PreTrainedModel
) -> tuple[dict[str, list[Callable[[nn.Module], nn.Module]]], list[Technique]]:
    """What becomes of modules while they are read, and the techniques that attach afterwards."""
    conversions: dict[str, list[Callable[[nn.Module], nn.Module]]] = {}
    others = []
    for technique in chain:
        converts = technique.while_loading(model)
        if converts is None:
            others.append(technique)
            continue
        for name, convert in converts.items():
            conversions.setdefault(name, []).append(convert)
    return conversions, others


def device_of(recipe: Recipe) -> torch.device:
    """Where the recipe's device is in torch."""
    return torch.device({"rocm": "cuda"}.get(recipe.device.kind, recipe.device.kind))


def _skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights; its few computed buffers are real. What a module computes once
    from the config, as Gemma's embedding scale, it rounds to `dtype`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def _eos_token_ids(model: PreTrainedModel, folder: Path) -> frozenset[int]:
    """Tokens that end a text: generation_config.json's, else the config's."""
    eos = model.config.eos_token_id
    with suppress(OSError):
        eos = GenerationConfig.from_pretrained(folder).eos_token_id or eos
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
