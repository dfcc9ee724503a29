"""What `ullage run` changes so that a request fits: the least loss of quality first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ullage import techniques
from ullage.errors import DoesNotFit, TechniqueError
from ullage.planner.engines import ENGINES
from ullage.planner.memory import peak_bytes
from ullage.specs.calibration import Calibration
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.units import MIB, format_bytes

CHUNKS = (512, 256, 128, 64, 32)  # tokens; smaller chunks read the weights more often
SCHEMES = ("none", "int8", "nf4")  # of weights, in the order of their loss


@dataclass(frozen=True)
class Freedom:
    """What the search may change, that is, what the user left open."""

    weights: bool = True
    kv_dtype: bool = True
    prefill_chunk: bool = True
    sparsity: bool = True  # techniques for KV entries, which a search plans and a run leaves alone
    max_num_seqs: bool = True
    tensor_parallel: bool = True


@dataclass(frozen=True)
class Choice:
    """The recipe that fits and what its peak is, in bytes."""

    recipe: Recipe
    peak_bytes: int


def fit_run(
    recipe: Recipe,
    budget_bytes: int,
    freedom: Freedom,
    calibration: Calibration | None = None,
) -> Choice:
    """The first variant of `recipe`, from least to most loss, whose peak is inside `budget_bytes`.

    Raises:
        TechniqueError: a technique that can only be planned.
        DoesNotFit: none fits; carries the smallest budget that would.
    """
    _refuse_planned_only(recipe)
    recipe = ENGINES[recipe.execution.engine].settle(recipe)
    smallest_bytes = None
    for variant in _variants(recipe, freedom):
        variant_bytes = peak_bytes(variant, calibration)
        if variant_bytes <= budget_bytes:
            return Choice(variant, variant_bytes)
        smallest_bytes = min(smallest_bytes or variant_bytes, variant_bytes)
    assert smallest_bytes is not None  # there is always the recipe itself
    work = recipe.workload
    raise DoesNotFit(
        f"{recipe.model.name} with {work.prompt_tokens:,} + {work.output_tokens:,} tokens does not "
        f"fit in {format_bytes(budget_bytes)}: the smallest budget that works is "
        f"{as_memory_option(smallest_bytes)}.",
        needed_bytes=smallest_bytes,
    )


def _refuse_planned_only(recipe: Recipe) -> None:
    for choice in recipe.techniques:
        if not techniques.create(choice).runs:
            raise TechniqueError(f"{choice.name} can be planned, and is not run yet: leave it out.")


def _variants(recipe: Recipe, freedom: Freedom) -> Iterator[Recipe]:
    """From least to most loss: weights change last, KV entries before them, the chunk first."""
    execution = recipe.execution
    chunks: tuple[int, ...] = (execution.prefill_chunk,)
    if freedom.prefill_chunk:
        largest = execution.prefill_chunk or CHUNKS[0] + 1  # 0: all at once
        chunks += tuple(chunk for chunk in CHUNKS if chunk < largest)
    kv_dtypes = [execution.kv_dtype]
    if freedom.kv_dtype and execution.kv_dtype == "fp32":
        kv_dtypes.append("bf16")
    for choices in _weight_choices(recipe, freedom):
        for kv_dtype in kv_dtypes:
            for chunk in chunks:
                changed = replace(execution, kv_dtype=kv_dtype, prefill_chunk=chunk)
                yield replace(recipe, execution=changed, techniques=choices)


def _weight_choices(recipe: Recipe, freedom: Freedom) -> Iterator[tuple[TechniqueChoice, ...]]:
    if not freedom.weights:
        yield recipe.techniques
        return
    others = tuple(choice for choice in recipe.techniques if choice.name != "quantization")
    yield others
    for scheme in SCHEMES[1:]:
        choice = TechniqueChoice("quantization", {"scheme": scheme})
        if techniques.create(choice).unsupported(recipe.model) is None:
            yield (choice, *others)


def as_memory_option(size_bytes: int) -> str:
    """The option that sets a budget of `size_bytes`, rounded up."""
    return f"--memory {-(-size_bytes // MIB)}MiB"


def as_typed(choice: TechniqueChoice) -> str:
    """The choice as ``--technique`` takes it."""
    settings = ",".join(f"{key}={value}" for key, value in choice.settings.items())
    return f"{choice.name}:{settings}" if settings else choice.name


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
