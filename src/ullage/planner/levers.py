"""The levers of a recipe: what can be changed, one dimension at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ullage import techniques
from ullage.errors import InputError
from ullage.planner.costs import (
    FREE,
    Cost,
    kv_cost,
    plain_cost,
    sparsity_cost,
    weights_cost,
)
from ullage.planner.engines import ENGINES
from ullage.planner.search import Freedom
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES, KV_BITS
from ullage.specs.gguf_mixtures import TERNARY
from ullage.specs.plan import Recipe, TechniqueChoice

# Tokens a forward pass. Smaller ones read the weights more often.
CHUNKS = (8192, 2048, 512, 256, 128, 64, 32)
SEQUENCE_LIMITS = (256, 64, 16)  # a server's own limit, which its start-up reserves for
PARALLEL = (1, 2, 4, 8)  # devices that share each layer
SPARSITY = (
    *(TechniqueChoice("dms", {"kept": kept}) for kept in (0.5, 0.25, 0.125)),
    *(TechniqueChoice("camelot", {"slots": slots}) for slots in (4096, 1024, 512)),
)


@dataclass(frozen=True)
class Setting:
    """One place of a lever. `typed` is what sets it on the command line, "" for what was asked.
    `hardware` says that it takes other or more devices, `runs` that ullage can do it today."""

    typed: str
    apply: Callable[[Recipe], Recipe]
    cost: Cost = FREE
    runs: bool = True
    hardware: bool = False


@dataclass(frozen=True)
class Lever:
    """One dimension: its settings, the asked one first."""

    name: str
    settings: tuple[Setting, ...]


def levers_of(recipe: Recipe, freedom: Freedom, devices: Sequence[Device] = ()) -> list[Lever]:
    """Every lever of `recipe`, in the order in which they are to be applied: those that the user
    fixed have one setting. `devices` are others that would do."""
    found = (
        ("device", _asked(), _devices(recipe, devices)),
        ("weights", _asked_weights(recipe), _weights(recipe) if freedom.weights else ()),
        ("KV entries", _asked_kv(recipe), _kv_dtypes(recipe) if freedom.kv_dtype else ()),
        ("sparsity", _asked_sparsity(recipe), _sparsity(recipe) if freedom.sparsity else ()),
        ("attention", _asked(), _attentions(recipe)),
        ("chunk", _asked(), _chunks(recipe) if freedom.prefill_chunk else ()),
        ("sequences", _asked(), _limits(recipe) if freedom.max_num_seqs else ()),
        ("tensor parallel", _asked(), _parallel(recipe) if freedom.tensor_parallel else ()),
    )
    return [Lever(name, (asked, *others)) for name, asked, others in found]


def combinations(
    recipe: Recipe, levers: Sequence[Lever]
) -> Iterator[tuple[Recipe, tuple[Setting, ...]]]:
    """Every combination, that of the first settings first and the last lever moving fastest, with
    the recipe that it makes. Those that begin alike share the recipe so far."""
    if not levers:
        yield recipe, ()
        return
    for setting in levers[0].settings:
        for made, others in combinations(setting.apply(recipe), levers[1:]):
            yield made, (setting, *others)


def _asked(cost: Cost = FREE, runs: bool = True) -> Setting:
    return Setting("", lambda recipe: recipe, cost, runs)


def _executed(typed: str, cost: Cost = FREE, hardware: bool = False, **changes: object) -> Setting:
    """A setting that changes the execution alone."""

    def apply(recipe: Recipe) -> Recipe:
        return replace(recipe, execution=replace(recipe.execution, **changes))  # type: ignore[arg-type]

    return Setting(typed, apply, cost, hardware=hardware)


def _devices(recipe: Recipe, devices: Sequence[Device]) -> Iterator[Setting]:
    for device in devices:
        if device != recipe.device:
            yield Setting(f"--device {device.name}", _on(device), hardware=True)


def _on(device: Device) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, device=device)


def _asked_weights(recipe: Recipe) -> Setting:
    """As the engine holds them: it may make a file of its own of a model, which takes a while."""
    held = ENGINES[recipe.execution.engine].settle(recipe).model
    asked = _scheme(recipe) or recipe.model.converted
    plain = not asked or asked in DTYPE_BYTES
    cost = plain_cost(recipe, recipe.execution.dtype) if plain else weights_cost(recipe, asked)
    return Setting("", lambda changed: replace(changed, model=held), cost)


def _scheme(recipe: Recipe) -> str | None:
    for choice in recipe.techniques:
        if choice.name == "quantization":
            return str(choice.settings.get("scheme", "int8"))
    return None


def _weights(recipe: Recipe) -> Iterator[Setting]:
    """The other formats that the engine makes of the model; of plain ones bf16 alone, beside fp32,
    and none that only models bear that were trained so."""
    engine = ENGINES[recipe.execution.engine]
    fixed = recipe.model.prequantized and not engine.converts
    if fixed or _scheme(recipe) not in (None, "none"):
        return
    kept = (choice for choice in recipe.techniques if choice.name != "quantization")
    bare = replace(recipe, techniques=tuple(kept))
    for weights in engine.makes(recipe.device):
        if weights in TERNARY:
            continue
        if weights not in DTYPE_BYTES:
            cost = weights_cost(recipe, weights)
        elif (weights, recipe.execution.dtype) == ("bf16", "fp32"):
            cost = plain_cost(recipe, weights)
        else:
            continue
        changed = engine.with_weights(bare, weights)
        if _can_quantize(changed):
            yield Setting(f"--weights {weights}", _formats_of(changed), cost)


def _formats_of(changed: Recipe) -> Callable[[Recipe], Recipe]:
    """Everything that a format of weights changes, made once: a model in it keeps its sums."""

    def apply(recipe: Recipe) -> Recipe:
        execution = changed.execution
        formats = replace(recipe.execution, dtype=execution.dtype, kv_dtype=execution.kv_dtype)
        return replace(
            recipe, model=changed.model, execution=formats, techniques=changed.techniques
        )

    return apply


def _can_quantize(changed: Recipe) -> bool:
    return all(
        techniques.create(choice).unsupported(changed.model) is None
        for choice in changed.techniques
    )


def _asked_kv(recipe: Recipe) -> Setting:
    execution = recipe.execution
    return _asked(kv_cost(recipe.model, execution.kv_dtype, execution.dtype))


def _kv_dtypes(recipe: Recipe) -> Iterator[Setting]:
    """The engine's narrower formats, one of each width; of ours int8 only where there is a figure
    of what it costs, and fp8 never: it takes as many bytes and is less exact."""
    execution = recipe.execution
    is_ours = execution.engine == "ullage"
    seen_bits = {KV_BITS[execution.kv_dtype]}
    for name in ENGINES[execution.engine].kv_dtypes:
        bits = KV_BITS[name]
        if bits < KV_BITS[execution.kv_dtype] and bits not in seen_bits:
            cost = kv_cost(recipe.model, name, execution.dtype)
            if is_ours and (name == "fp8" or (name == "int8" and cost.figure is None)):
                continue
            seen_bits.add(bits)
            yield _executed(f"--kv-cache-dtype {name}", cost, kv_dtype=name)


def _asked_sparsity(recipe: Recipe) -> Setting:
    for choice in techniques.settled(recipe).techniques:
        if choice.name in ("dms", "camelot"):
            cost = sparsity_cost(recipe.model, choice)
            return _asked(cost, runs=techniques.create(choice).runs)
    return _asked()


def _sparsity(recipe: Recipe) -> Iterator[Setting]:
    for choice in SPARSITY:
        technique = techniques.create(choice)
        here = recipe.execution.engine in technique.engines
        if here and technique.unsupported(recipe.model) is None:
            cost = sparsity_cost(recipe.model, choice)
            yield Setting(
                f"--technique {techniques.as_typed(choice)}", _with(choice), cost, technique.runs
            )


def _with(choice: TechniqueChoice) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, techniques=(*recipe.techniques, choice))


def _chunks(recipe: Recipe) -> Iterator[Setting]:
    largest = recipe.execution.prefill_chunk or recipe.workload.prompt_tokens
    for chunk in CHUNKS:
        if chunk < largest:
            yield _executed(f"--prefill-chunk {chunk}", prefill_chunk=chunk)


def _limits(recipe: Recipe) -> Iterator[Setting]:
    asked = ENGINES[recipe.execution.engine].settle(recipe).execution.max_num_seqs
    for limit in SEQUENCE_LIMITS:
        if asked is not None and recipe.workload.sequences <= limit < asked:
            yield _executed(f"--max-num-seqs {limit}", max_num_seqs=limit)


def _attentions(recipe: Recipe) -> Iterator[Setting]:
    usual = ENGINES[recipe.execution.engine].attentions[0]
    if recipe.execution.attention == "eager":
        yield _executed(f"--attention {usual}", attention=usual)


def _parallel(recipe: Recipe) -> Iterator[Setting]:
    for devices in PARALLEL:
        if devices > recipe.execution.tensor_parallel:
            setting = _executed(f"--tp {devices}", hardware=True, tensor_parallel=devices)
            if _settles(setting.apply(recipe)):
                yield setting


def _settles(recipe: Recipe) -> bool:
    try:
        ENGINES[recipe.execution.engine].settle(recipe)
    except InputError:
        return False
    return True
