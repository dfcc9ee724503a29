"""The peak that vLLM measures before it sizes its KV pool: a dummy forward pass of
`max_num_batched_tokens`, then a dummy run of the sampler.

Letters as in the field: N tokens in a step, h hidden size, I width of the MLP, V vocabulary.
"""

from ullage.planner.constants import Constants
from ullage.planner.engines.paging import is_latent
from ullage.planner.engines.shards import Stage
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Part, Term
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.workload import Execution

LATENT_TOKENS = 64 * 1024  # context that is expanded at once, at most


def peak_terms(
    model: ModelSpec, execution: Execution, stage: Stage, constants: Constants
) -> list[Term]:
    """The higher of the forward pass and the sampler, and what stands beside either."""
    forward = _forward(model, execution, stage, constants)
    sampler = _sampler(model, execution, constants)
    highest = sampler if stage.last and sampler.nbytes > forward.nbytes else forward
    fixed = constants["fixed_activation_bytes"]
    terms = [
        highest,
        Term("activation", "buffers of the model runner", int(fixed.value), fixed.label,
             fixed.source),
    ]  # fmt: skip
    experts = [tensor for tensor in model.tensors if tensor.role == "expert"]
    if experts:
        terms.append(_expert_workspace(model, execution, experts, constants))
    if model.encoder and stage.first:
        terms.append(_images(model, execution, constants))
    return terms


def _sampler(model: ModelSpec, execution: Execution, constants: Constants) -> Term:
    """`max_num_seqs` rows of logits with the copies that sampling makes of them, while the hidden
    states of the whole step are still held."""
    assert execution.max_num_seqs is not None  # settled
    rows = min(execution.max_num_seqs, execution.prefill_chunk)
    number = constants["sampler_number_bytes"]
    dtype_bytes = DTYPE_BYTES[execution.dtype]
    each_bytes = dtype_bytes + int(number.value)
    scratch_rows = min(rows, int(constants["top_k_rows"].value))
    nbytes = model.vocab_size * (rows * each_bytes + scratch_rows * 4)
    nbytes += execution.prefill_chunk * model.hidden_size * dtype_bytes
    source = (
        f"{rows:,} rows x {model.vocab_size:,} x {each_bytes} B, scratch of top-k, "
        f"{execution.prefill_chunk:,} hidden states; {number.source}"
    )
    return Term("logits", "profile peak: sampler", nbytes, number.label, source)


def _forward(model: ModelSpec, execution: Execution, stage: Stage, constants: Constants) -> Term:
    """The layer that stands highest: gate, up and their product, or q, k, v and the output, beside
    the hidden states; between stages those are handed on with their residual."""
    tokens, split = execution.prefill_chunk, execution.tensor_parallel
    copies = constants["hidden_copies"]
    hidden = int(copies.value * model.hidden_size)
    if not (stage.first and stage.last):
        hidden += 2 * model.hidden_size
    dtype_bytes = DTYPE_BYTES[execution.dtype]
    mlp, attention = _mlp_bytes(model, split, dtype_bytes), _attention_bytes(model, execution)
    nbytes = max(tokens * mlp, tokens * attention + _latent_bytes(model, execution))
    nbytes += tokens * hidden * dtype_bytes
    source = f"{tokens:,} tokens in the widest layer; {copies.source}"
    part: Part = "activation"
    return Term(part, "profile peak: forward pass", nbytes, copies.label, source)


def _mlp_bytes(model: ModelSpec, split: int, dtype_bytes: int) -> int:
    """A token in a plain MLP; 8-bit weights multiply 8-bit copies of what goes in. Experts have
    their workspace."""
    plain = [tensor for tensor in model.tensors if tensor.role == "linear"]
    inner = -(-_plain_width(model) // split)
    copies = 3 if model.gated_mlp else 2
    quantized = any(tensor.storage and tensor.storage.bits == 8 for tensor in plain)
    return inner * (copies * dtype_bytes + quantized)


def _plain_width(model: ModelSpec) -> int:
    """Width of the widest MLP that is no expert."""
    if not any(tensor.role == "expert" for tensor in model.tensors):
        return model.intermediate_size
    widths = [
        tensor.shape[-1]
        for tensor in model.tensors
        if tensor.role == "linear" and tensor.name.endswith("down_proj.weight")
    ]
    return max(widths, default=0)


def _attention_bytes(model: ModelSpec, execution: Execution) -> int:
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    number_bytes = DTYPE_BYTES[execution.dtype]
    return -(-heads // execution.tensor_parallel) * model.head_dim * number_bytes


def _latent_bytes(model: ModelSpec, execution: Execution) -> int:
    """Latents of earlier chunks, expanded to the keys and values of every head."""
    if not model.caches or not is_latent(model):
        return 0
    heads = model.num_heads // execution.tensor_parallel
    # values are as wide as keys without their rotary part; taken as wide as with it
    width = 2 * model.head_dim * DTYPE_BYTES[execution.dtype]
    return LATENT_TOKENS * heads * width


def _expert_workspace(
    model: ModelSpec, execution: Execution, experts: list[TensorSpec], constants: Constants
) -> Term:
    """Two buffers of the fused experts' kernels, a row for each token and expert that it goes
    through. They are kept, so that they stand under the sampler too."""
    workspace = constants["expert_workspaces"]
    active = max(tensor.active or 1 for tensor in experts)
    inner = min(tensor.elements for tensor in experts) // model.hidden_size
    inner = -(-inner // execution.tensor_parallel)
    width = max(inner, model.hidden_size) + max(2 * inner, model.hidden_size)
    fused = any(tensor.storage and tensor.storage.name == "mxfp4" for tensor in experts)
    rows = 0 if fused else execution.prefill_chunk * active
    nbytes = int(workspace.value * rows * width * DTYPE_BYTES[execution.dtype])
    source = f"{rows:,} rows x {width:,} numbers; {workspace.source}"
    return Term("activation", "workspace of the experts", nbytes, workspace.label, source)


def _images(model: ModelSpec, execution: Execution, constants: Constants) -> Term:
    """Pixels of as many images as fill a step, and what the encoder makes of them."""
    pixels = constants["image_token_bytes"]
    each_bytes = int(pixels.value) + model.hidden_size * DTYPE_BYTES[execution.dtype]
    source = f"{execution.prefill_chunk:,} tokens x {each_bytes:,} B; {pixels.source}"
    nbytes = execution.prefill_chunk * each_bytes
    return Term("activation", "images of the profile", nbytes, pixels.label, source)
