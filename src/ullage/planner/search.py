"""The words of a search: what it may change, and how what it chose is typed and read."""

from dataclasses import dataclass

from ullage.specs.plan import Recipe
from ullage.techniques import as_typed
from ullage.units import MIB


@dataclass(frozen=True)
class Freedom:
    """What the search may change, that is, what the user left open."""

    weights: bool = True
    kv_dtype: bool = True
    prefill_chunk: bool = True
    sparsity: bool = True  # techniques for KV entries, which a search plans and a run leaves alone
    max_num_seqs: bool = True
    tensor_parallel: bool = True


def as_memory_option(size_bytes: int) -> str:
    """The option that sets a budget of `size_bytes`, rounded up."""
    return f"--memory {-(-size_bytes // MIB)}MiB"


def describe(recipe: Recipe) -> str:
    """The recipe's settings in one line, as a user reads them."""
    execution = recipe.execution
    others = [as_typed(choice) for choice in recipe.techniques if choice.name != "quantization"]
    chunk = f"in chunks of {execution.prefill_chunk}" if execution.prefill_chunk else "in one pass"
    parts = [
        f"{_weights_format(recipe)} weights",
        *others,
        f"{execution.kv_dtype} KV",
        f"{execution.attention} attention",
        f"prompt {chunk}",
    ]
    return ", ".join(parts)


def _weights_format(recipe: Recipe) -> str:
    """What the weights are quantized to while they are read, else what the model was given here,
    else what most of a quantized checkpoint is in, else the arithmetic's own."""
    for choice in recipe.techniques:
        if choice.name == "quantization":
            return str(choice.settings.get("scheme", "int8"))
    model = recipe.model
    return model.converted or next(iter(model.stored_formats), recipe.execution.dtype)
