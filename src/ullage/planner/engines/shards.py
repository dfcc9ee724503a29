"""What one device of several holds of a model: tensor and pipeline parallelism as vLLM and SGLang
split them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from ullage.errors import InputError
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.workload import Execution

VOCAB_ROWS = 64  # vocabularies are padded to a multiple of this

# Projections whose columns are split, for their input is: every device adds its part of the sum.
_ROW_PARALLEL = (
    "o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "c_proj", "w2", "wo",
)  # fmt: skip
_KV = ("k_proj", "v_proj")
# Low ranks, and what scores experts or tokens: every device computes them whole.
_WHOLE = (
    "q_a_proj", "kv_a_proj_with_mqa", "f_a_proj", "g_a_proj", "gate", "shared_expert_gate",
    "fc1_latent_proj", "fc2_latent_proj", "wq_b", "wk", "weights_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The layers that one rank of the pipeline holds, and whether the embedding and the output
    head are with it."""

    layers: range
    first: bool
    last: bool

    def part(self, tensor: TensorSpec) -> int:
        """How many of the tensor's layers are here; 0 or 1 for a weight outside of the layers."""
        if tensor.layers:
            return sum(layer in self.layers for layer in tensor.layers)
        if tensor.role == "embedding":
            return int(self.first)
        return int(self.last)


@lru_cache(maxsize=256)
def stages(num_layers: int, pipeline_parallel: int) -> tuple[Stage, ...]:
    """vLLM's split: what does not divide goes to the last ranks, but for the very last one."""
    count, rest = divmod(num_layers, pipeline_parallel)
    sizes = [count] * pipeline_parallel
    for rank in range(2, rest + 2):
        sizes[-rank] += 1
    ends = [sum(sizes[: rank + 1]) for rank in range(pipeline_parallel)]
    return tuple(
        Stage(range(end - size, end), rank == 0, rank == pipeline_parallel - 1)
        for rank, (end, size) in enumerate(zip(ends, sizes, strict=True))
    )


def check_split(model: ModelSpec, execution: Execution) -> None:
    """Refuse what does not divide.

    Raises:
        InputError: heads or layers that cannot be shared out.
    """
    split, depth = execution.tensor_parallel, execution.pipeline_parallel
    if split < 1 or depth < 1:
        raise InputError("--tp and --pp are numbers of devices, 1 or more.")
    if model.num_heads % split:
        raise InputError(
            f"{model.name} has {model.num_heads} attention heads: --tp {split} does not divide "
            "them."
        )
    kv_heads = model.num_kv_heads
    if kv_heads % split and split % kv_heads:
        raise InputError(
            f"{model.name} has {kv_heads} KV heads: --tp {split} neither divides them nor is a "
            "multiple of them."
        )
    if depth > model.num_layers:
        raise InputError(f"{model.name} has {model.num_layers} layers, too few for --pp {depth}.")


def kept_heads(heads: int, split: int) -> int:
    """KV heads on one device: never less than one, so that some are held twice."""
    return max(1, -(-heads // split))


@lru_cache(maxsize=256)
def weights_bytes(model: ModelSpec, dtype: str, split: int, stage: Stage) -> int:
    """Bytes of the text model's weights on one of `split` devices of `stage`."""
    parts = sum(_bytes(shard(model, tensor, split), dtype, stage) for tensor in model.tensors)
    if model.tie_embeddings and stage.last and not stage.first:
        # the last rank needs a copy of the embedding for its head
        table = next(tensor for tensor in model.tensors if tensor.role == "embedding")
        parts += shard(model, table, split).stored_bytes(dtype)
    return parts


def _bytes(tensor: TensorSpec, dtype: str, stage: Stage) -> int:
    return tensor.stored_bytes(dtype) * tensor.copies * stage.part(tensor)


def tower_bytes(tensors: Iterable[TensorSpec], dtype: str, split: int) -> int:
    """Bytes of a vision tower on one device: its projections are split, embeddings are not."""
    return sum(
        tensor.stored_bytes(dtype) * tensor.count // (split if _is_projection(tensor) else 1)
        for tensor in tensors
    )


def _is_projection(tensor: TensorSpec) -> bool:
    whole = ("embedding", "merging_layer", "pos_embed")
    return len(tensor.shape) == 2 and not any(word in tensor.name for word in whole)


def shard(model: ModelSpec, tensor: TensorSpec, split: int) -> TensorSpec:
    """One device's part of a weight, in one layer."""
    module = _module(tensor)
    if tensor.role in ("embedding", "head") and tensor.shape[0] == model.vocab_size:
        rows = _round_up(model.vocab_size, VOCAB_ROWS)
        return replace(tensor, shape=(-(-rows // split), *tensor.shape[1:]))
    if module in _KV:
        rows = tensor.shape[0]
        heads = kept_heads(model.num_kv_heads, split)
        return replace(tensor, shape=(rows * heads // model.num_kv_heads, *tensor.shape[1:]))
    if module == "qkv_proj":
        return replace(tensor, shape=(_fused_rows(model, split), *tensor.shape[1:]))
    return _plain_shard(model, tensor, split)


def _fused_rows(model: ModelSpec, split: int) -> int:
    heads = model.num_heads // split + 2 * kept_heads(model.num_kv_heads, split)
    return heads * model.head_dim


def _plain_shard(model: ModelSpec, tensor: TensorSpec, split: int) -> TensorSpec:
    """Split by columns or by rows; norms, biases and other small ones are held whole."""
    module = _module(tensor)
    if tensor.role not in ("linear", "expert") or module in _WHOLE or len(tensor.shape) < 2:
        return tensor
    *stack, rows, columns = tensor.shape
    if tensor.storage is not None and tensor.storage.name == "mxfp4" and tensor.role == "expert":
        return _padded_expert(model, tensor, split)
    if module in _ROW_PARALLEL:
        columns = -(-columns // split)
    else:
        rows = -(-rows // split)
    return replace(tensor, shape=(*stack, rows, columns))


def _padded_expert(model: ModelSpec, tensor: TensorSpec, split: int) -> TensorSpec:
    """The kernels of mxfp4 want the hidden side in steps of 256 and an expert's own in steps of
    128, on each device."""
    inner = tensor.elements // model.hidden_size
    halves = 2 if "gate_up" in tensor.name else 1
    each = inner // halves
    width = halves * _round_up(-(-each // split), 128)
    return replace(tensor, shape=(width, _round_up(model.hidden_size, 256)))


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _module(tensor: TensorSpec) -> str:
    """The last part of the weight's name: ``o_proj`` of ``....o_proj.weight``."""
    return tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
