"""What a forward pass of transformers' modules holds, in whichever engine they run.

Letters as in the field: N new tokens in a forward pass, T held tokens.
"""

from ullage.planner.constants import Constants
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Term
from ullage.specs.layer import attention_width, mlp_width
from ullage.specs.loading import load_spike_bytes
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.plan import Recipe
from ullage.specs.workload import Step


def layer_term(model: ModelSpec, step: Step) -> Term:
    """Hidden states of the layer that stands highest; layers run one after the other."""
    attention, mlp = attention_width(model), mlp_width(model)
    nbytes = step.new_tokens * max(attention, mlp) * DTYPE_BYTES[step.execution.dtype]
    widest = "attention" if attention > mlp else "MLP"
    source = f"{step.new_tokens:,} tokens x {max(attention, mlp):,} numbers, {widest} the widest"
    return Term("activation", "hidden states of one layer", nbytes, "exact", source)


def logits_term(model: ModelSpec, step: Step) -> Term:
    """The last token's logits in the model's format, and the fp32 copy that sampling reads."""
    number_bytes = DTYPE_BYTES[step.execution.dtype] + 4
    nbytes = step.sequences * model.vocab_size * number_bytes
    source = f"{step.sequences:,} rows x {model.vocab_size:,} x {number_bytes} B, fp32 copy too"
    return Term("logits", "logits of the last token", nbytes, "exact", source)


def eager_term(model: ModelSpec, step: Step) -> Term:
    """The score matrix, quadratic in the prompt: [heads, N, T] a sequence."""
    number_bytes = DTYPE_BYTES[step.execution.dtype]
    # scores and the softmax in fp32; a narrower format is widened for the softmax and narrowed
    # again
    score_bytes = 4 + 4 if number_bytes == 4 else number_bytes + 4 + 4
    scores = model.num_heads * step.new_tokens * step.held_tokens * score_bytes
    mask = step.new_tokens * step.held_tokens * number_bytes
    nbytes = scores + mask + repeated_kv_bytes(model, step)
    source = f"{model.num_heads} heads x {step.new_tokens:,} x {step.held_tokens:,} tokens, twice"
    return Term("activation", "score matrix, its softmax and mask", nbytes, "exact", source)


def repeated_kv_bytes(model: ModelSpec, step: Step) -> int:
    """K and V of one layer, repeated to all query heads."""
    if model.num_heads == model.num_kv_heads:
        return 0
    width = 2 * model.num_heads * model.head_dim
    return step.sequences * step.held_tokens * width * DTYPE_BYTES[step.execution.dtype]


def conversion_term(model: ModelSpec, dtype: str) -> Term:
    """Weights of another format than the checkpoint's are read into a staging copy each."""
    nbytes = 0
    if not model.prequantized and model.dtype != dtype:
        stored_bytes = DTYPE_BYTES[model.dtype]

        def resident(tensor: TensorSpec) -> int:
            return tensor.elements * DTYPE_BYTES[dtype]

        nbytes = load_spike_bytes(model, resident, lambda tensor: tensor.elements * stored_bytes)
    source = f"{model.dtype} read, {dtype} kept, one tensor at a time"
    return Term("activation", "staging copy while loading", nbytes, "exact", source)


def repacked_terms(recipe: Recipe, step: Step, constants: Constants) -> list[Term]:
    """On a CPU oneDNN lays a narrow weight out anew for products of several rows: a copy, of one at
    a time, and buffers of its own."""
    dtype = step.execution.dtype
    if recipe.device.kind != "cpu" or dtype == "fp32":
        return []
    largest = max(tensor.elements for tensor in recipe.model.tensors if len(tensor.shape) > 1)
    source = f"{largest:,} numbers, the output head among them"
    nbytes = largest * DTYPE_BYTES[dtype]
    own = constants["onednn_bytes"]
    return [
        Term("activation", f"a weight laid out anew in {dtype}", nbytes, "exact", source),
        Term("activation", "buffers of oneDNN", int(own.value), own.label, own.source),
    ]


def kv_term(model: ModelSpec, step: Step, what: str, sequence_bytes: int, source: str) -> Term:
    """The KV entries of each sequence, and its convolution and recurrent states, which do not
    grow."""
    nbytes = step.sequences * (sequence_bytes + model.state_bytes)
    return Term("kv", f"{what} in {step.execution.kv_dtype}", nbytes, "exact", source)
