"""Weights as planned: read one tensor at a time, largest first, into the format that stays.

Nothing is memory-mapped and nothing is held twice, so that the load's peak is the loaded weights
and one staging copy; a quantized projection is converted as soon as it has been read.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ullage import techniques
from ullage.errors import CheckpointError
from ullage.kv import attention
from ullage.specs.plan import Recipe
from ullage.specs.safetensors import StoredTensor, read_headers, same_data
from ullage.specs.sources import read_config
from ullage.techniques.quantization.linear import (
    projections,
    quantize,
    replace_module,
    tensor_bytes,
)
from ullage.techniques.quantization.settings import Quantization

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, with ullage's attention."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]

    def nbytes(self) -> int:
        """Bytes of the weights as they are, quantized ones with their scales."""
        return sum(tensor_bytes(parameter) for parameter in self.model.parameters())

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
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} holds no readable tokenizer: {_one_line(error)}"
        ) from error


def load_model(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """The model in `folder` as `recipe` plans it: format, quantization, device.

    Raises:
        CheckpointError: weights that are missing, unknown, misshapen or truncated.
    """
    attention.register()
    model = _skeleton(folder, TORCH_DTYPES[recipe.execution.dtype])
    reader = _Reader(model, recipe)
    stored = sorted(
        read_headers(folder), key=lambda tensor: tensor.end - tensor.begin, reverse=True
    )
    if model.config.tie_word_embeddings:
        _check_tied(stored)
    total_bytes = sum(tensor.end - tensor.begin for tensor in stored)
    read_bytes = 0
    for tensor in stored:
        reader.place(tensor)
        read_bytes += tensor.end - tensor.begin
        if on_progress is not None:
            on_progress(read_bytes, total_bytes)
    reader.finish()
    model.eval().set_attn_implementation(attention.NAME)
    return LoadedModel(model, tokenizer, _eos_token_ids(model, folder))


def device_of(recipe: Recipe) -> torch.device:
    """Where the recipe's device is in torch."""
    return torch.device({"rocm": "cuda"}.get(recipe.device.kind, recipe.device.kind))


def _skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights; its few computed buffers are real. What a module computes once
    from the config, as Gemma's embedding scale, it rounds to `dtype`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


class _Reader:
    """Puts stored tensors where they belong in a skeleton."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe) -> None:
        self.model = model
        self.dtype = TORCH_DTYPES[recipe.execution.dtype]
        self.device = device_of(recipe)
        self.missing = {name for name, _ in model.named_parameters()}
        self.scheme = _scheme(recipe)
        self.to_quantize = (
            {f"{name}.weight" for name, _ in projections(model)} if self.scheme != "none" else set()
        )

    def place(self, tensor: StoredTensor) -> None:
        """Read `tensor` into its parameter, quantized if it is to be."""
        name = self._name(tensor.name)
        if name is None:
            return
        weight = _read(tensor).to(self.device, self.dtype)
        module_name, _, parameter = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if weight.shape != getattr(module, parameter).shape:
            raise CheckpointError(
                f"{tensor.name} has shape {list(weight.shape)}, not the config's."
            )
        setattr(module, parameter, nn.Parameter(weight, requires_grad=False))
        self.missing.discard(name)
        if name in self.to_quantize:
            assert isinstance(module, nn.Linear)
            del weight  # so that the full weight is gone when its layer is replaced
            replace_module(self.model, module_name, quantize(module, self.scheme))

    def finish(self) -> None:
        """Tie what is tied; raise when a weight was not in the checkpoint."""
        self.model.tie_weights()
        left = {name for name, parameter in self.model.named_parameters() if parameter.is_meta}
        if left:
            raise CheckpointError(f"The checkpoint lacks {len(left)} weights, {min(left)} first.")
        self.model.to(self.device)  # the computed buffers; the weights are there

    def _name(self, stored: str) -> str | None:
        """The parameter that a checkpoint's name means; None for what the model computes itself.
        Checkpoints of bare or of wrapped models leave out or add a prefix."""
        base = self.model.base_model_prefix
        bare = stored.replace("language_model.", "").removeprefix("model.").removeprefix(f"{base}.")
        if _is_computed(stored) or self._is_tied(bare):
            return None
        for name in (stored, f"{base}.{bare}", bare):
            if name in self.missing:
                return name
        raise CheckpointError(
            f"The checkpoint holds {stored!r}, which this model has no place for."
        )

    def _is_tied(self, name: str) -> bool:
        return name == "lm_head.weight" and bool(self.model.config.tie_word_embeddings)


def _check_tied(stored: list[StoredTensor]) -> None:
    """Refuse a head of its own under a config that ties it: loading would drop it unseen."""
    heads = [tensor for tensor in stored if tensor.name.endswith("lm_head.weight")]
    tables = [tensor for tensor in stored if tensor.name.endswith(_EMBEDDINGS)]
    for head in heads:
        if not any(same_data(head, table) for table in tables):
            raise CheckpointError(
                f"{head.name} differs from the embedding that config.json ties it to: set "
                "tie_word_embeddings to what the model was trained with."
            )


def _scheme(recipe: Recipe) -> str:
    for choice in recipe.techniques:
        technique = techniques.create(choice)
        if isinstance(technique, Quantization):
            return technique.scheme
    return "none"


def _is_computed(name: str) -> bool:
    """Buffers that old checkpoints store and models compute, and towers that text does not use."""
    return name.endswith((".inv_freq", ".attn.bias", ".attn.masked_bias")) or name.startswith(
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal")
    )


def _read(tensor: StoredTensor) -> torch.Tensor:
    """The tensor from its file, read and not mapped, in the stored format."""
    dtype = _STORED_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise CheckpointError(f"{tensor.name} is stored as {tensor.dtype}, which is not supported.")
    weight = torch.empty(tensor.shape, dtype=dtype)
    view = weight.view(-1).view(torch.uint8).numpy().data
    try:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.begin)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{tensor.file} ends inside {tensor.name}.")
                done += count
    except OSError as error:
        raise CheckpointError(f"Cannot read {tensor.file}: {error.strerror}.") from error
    return weight


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
