"""Hold the tensors of a folder's files against those that its config asks for."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ullage.errors import ModelError
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.safetensors import StoredTensor

# What some checkpoints store beside their weights: GPT-2's masks and old rotary tables, and scales
# of the KV cache.
_BUFFERS = re.compile(
    r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq|[qkv]v?_scale|prob_output_scale)"
)
# A vision or audio encoder and its projector, which a text-only run does not read.
_ENCODER = re.compile(
    r"(model\.)?(vision_tower|vision_model|vision_embedder|visual|audio_tower|embed_vision"
    r"|embed_audio|multi_modal_projector|mm_projector|patch_merge_mlp|image_newline)(\..*)?"
)
# Heads that predict more tokens ahead, which the causal classes do not load.
_AHEAD = re.compile(r"(model\.)?mtp[._].*")
_LAYER = re.compile(r"(?:model|backbone|transformer)\.(?:layers|h)\.(\d+)\.")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8", "U8")


class Comparison:
    """What is stored, and what of it the spec has found its place for."""

    def __init__(self, spec: ModelSpec, stored: Iterable[StoredTensor], layers_ahead: int) -> None:
        self._spec, self._layers_ahead = spec, layers_ahead
        self._left = {text_name(tensor.name): tensor for tensor in stored}
        self._inside: dict[str, list[str]] = {}
        for name in self._left:
            self._inside.setdefault(name.rpartition(".")[0], []).append(name)
        self._fused: set[str] = set()
        self.nbytes = 0

    def run(self) -> tuple[TensorSpec, ...]:
        """Place every tensor; count the text model's bytes in `nbytes`, and return the encoder's
        tensors.

        Raises:
            ModelError: a tensor is missing, misshapen, or has no place.
        """
        for tensor in self._spec.tensors:
            for name in tensor.names():
                if tensor.storage is None:
                    self._plain(tensor, name)
                else:
                    self._packed(tensor, name)
        return self._rest()

    def _plain(self, tensor: TensorSpec, name: str) -> None:
        found = self._take(name) or self._take(name.partition(".")[2])  # a model without its head
        if found is None:
            if tensor.role == "expert" and self._fused_experts(tensor, name):
                return
            raise ModelError(f"The checkpoint lacks {name}, which its config asks for.")
        shape = tensor.stored_shape
        # stacked experts are published both ways round
        turned = tensor.role == "expert" and sorted(found.shape) == sorted(shape)
        if found.shape != shape and not turned:
            raise _misshapen(name, found.shape, shape)

    def _fused_experts(self, tensor: TensorSpec, name: str) -> bool:
        """Experts of one layer in one tensor, gate and up together, where the spec has modules."""
        block, _, rest = name.partition(".experts.")
        part = "down_proj" if ".down_proj" in rest or ".w2" in rest else "gate_up_proj"
        fused = f"{block}.experts.{part}"
        if fused in self._fused:
            return True
        found = self._take(fused) or self._take(f"{fused}.weight")
        if found is None:
            return False
        parts = 1 if part == "down_proj" else 2
        if prod(found.shape) != parts * tensor.copies * tensor.elements:
            raise _misshapen(fused, found.shape, (tensor.copies, *tensor.shape))
        self._fused.add(fused)
        return True

    def _packed(self, tensor: TensorSpec, name: str) -> None:
        """A quantized weight: its numbers and all that stands beside them."""
        if name in self._fused:
            return
        weight = self._left.get(name)
        if weight is not None and weight.dtype in _EIGHT_BITS and len(tensor.shape) == 2:
            whole = tensor.storage is not None and tensor.storage.bits == 8
            if whole and weight.shape != tensor.stored_shape:
                raise _misshapen(name, weight.shape, tensor.stored_shape)
            if not whole and weight.dtype.startswith("F8"):
                raise ModelError(f"{name} is {weight.dtype}, which its config does not say.")
        module = name.removesuffix(".weight")
        names = [
            *self._inside.get(module, ()),
            *(
                other
                for other in self._inside.get(module.rpartition(".")[0], ())
                if other.startswith((f"{module}_", module)) and not other.endswith("_bias")
            ),
        ]
        before_bytes = self.nbytes
        taken = [other for other in names if not other.endswith(".bias") and self._take(other)]
        if not taken and not self._stack_of(name):
            raise ModelError(f"The checkpoint lacks {name}, which its config asks for.")
        if taken and self.nbytes - before_bytes < _least_bytes(tensor):
            raise ModelError(f"The checkpoint lacks a part of {name}: its scales, or its numbers.")

    def _stack_of(self, name: str) -> bool:
        """Experts quantized together where the spec has modules, or the other way round."""
        block, _, inside = name.partition(".experts.")
        if not inside:
            return False
        prefix = f"{block}.experts"
        if prefix not in self._fused:
            stacks = inside.partition(".")[0].isdigit()
            parents = [
                parent
                for parent in self._inside
                if parent == prefix or (not stacks and parent.startswith(f"{prefix}."))
            ]
            taken = [self._take(each) for parent in parents for each in self._inside[parent]]
            if any(taken):
                self._fused.add(prefix)
        return prefix in self._fused

    def _take(self, name: str) -> StoredTensor | None:
        found = self._left.pop(name, None)
        if found is not None:
            self.nbytes += found.end - found.begin
        return found

    def _rest(self) -> tuple[TensorSpec, ...]:
        tied = {"lm_head.weight"} if self._spec.tie_embeddings else set()
        encoder = []
        for name, tensor in self._left.items():
            if _ENCODER.fullmatch(name):
                encoder.append(TensorSpec(name, tensor.shape, "other"))
            elif name not in tied and not self._unread(name):
                raise ModelError(
                    f"The checkpoint holds {name[:200]}, which its config has no place for."
                )
        return tuple(encoder)

    def _unread(self, name: str) -> bool:
        if _BUFFERS.fullmatch(f".{name}") or _AHEAD.fullmatch(name):
            return True
        layer = _LAYER.match(name)
        depth = self._spec.num_layers
        return layer is not None and depth <= int(layer[1]) < depth + self._layers_ahead


def text_name(name: str) -> str:
    """A tensor of a wrapped text model under the name that it has alone."""
    return name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)


def layers_ahead(config: Mapping[str, Any]) -> int:
    """Layers behind the last that predict more tokens: stored, and not loaded."""
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, dict) else {}):
        count = settings.get("num_nextn_predict_layers")
        if type(count) is int and 0 < count < 64:
            return count
    return 0


def _least_bytes(tensor: TensorSpec) -> int:
    """Bytes of a quantized weight's numbers, and of scales a quarter as wide as is usual."""
    storage = tensor.storage
    if storage is None:
        return 0
    narrow = replace(storage, group_bytes=storage.group_bytes / 4, column_bytes=0.0)
    return narrow.nbytes(tensor.stored_shape)


def _misshapen(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> ModelError:
    return ModelError(f"{name} is {list(found)} in the checkpoint, {list(wanted)} by its config.")
