"""Stored tensors into a model's skeleton: read one at a time, largest first, into the format that
stays.

Nothing is memory-mapped and nothing is held twice, so that the load's peak is the loaded weights
and one staging copy; a module that a technique converts is converted as soon as it has been read.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ullage.errors import CheckpointError
from ullage.specs.safetensors import StoredTensor, read_headers, same_data

Progress = Callable[[int, int], None]  # bytes read, bytes in all
Conversions = Mapping[str, Sequence[Callable[[nn.Module], nn.Module]]]  # by the module's name

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Reader:
    """Puts stored tensors where they belong in a skeleton."""

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: torch.device,
        conversions: Conversions,
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.conversions = conversions
        self.missing = {name for name, _ in model.named_parameters()}

    def read(self, folder: Path, on_progress: Progress | None = None) -> None:
        """Read all that is stored in `folder`.

        Raises:
            CheckpointError: weights that are missing, unknown, misshapen or truncated.
        """
        stored = sorted(
            read_headers(folder), key=lambda tensor: tensor.end - tensor.begin, reverse=True
        )
        if self.model.config.tie_word_embeddings:
            _check_tied(stored)
        total_bytes = sum(tensor.end - tensor.begin for tensor in stored)
        read_bytes = 0
        for tensor in stored:
            self._place(tensor)
            read_bytes += tensor.end - tensor.begin
            if on_progress is not None:
                on_progress(read_bytes, total_bytes)
        self._finish()

    def _place(self, tensor: StoredTensor) -> None:
        """Read `tensor` into its parameter, and convert what it completes."""
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
        del weight, module  # so that the full weight is gone when its module is replaced
        if parameter == "weight":
            for convert in self.conversions.get(module_name, ()):
                module = convert(self.model.get_submodule(module_name))
                self.model.set_submodule(module_name, module)
                del module

    def _finish(self) -> None:
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
