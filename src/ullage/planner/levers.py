"""The levers of a recipe: what can be changed, one dimension at a time, and what it costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from ullage import techniques
from ullage.errors import InputError
from ullage.planner.engines import ENGINES
from ullage.planner.search import Freedom, as_typed
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES, KV_BITS
from ullage.specs.gguf_mixtures import TERNARY
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.quality import Quality, find, find_tail

# Tokens a forward pass. Smaller ones read the weights more often.
CHUNKS = (8192, 2048, 512, 256, 128, 64, 32)
SEQUENCE_LIMITS = (256, 64, 16)  # a server's own limit, which its start-up reserves for
PARALLEL = (1, 2, 4, 8)  # devices that share each layer
SPARSITY = (
    *(TechniqueChoice("dms", {"kept": kept}) for kept in (0.5, 0.25, 0.125)),
    *(TechniqueChoice("camelot", {"slots": slots}) for slots in (4096, 1024, 512)),
)
# Servers' names of formats that our figures are kept under others for.
_SERVED_FORMATS = {"int8": "w8a8", "int4": "w4a16"}
_OWN_ENGINES = ("ullage", "transformers")


@dataclass(frozen=True)
class Cost:
    """What one choice costs: a figure, or none where there is none, and one of the `tail`. `free`
    changes no result."""

    figure: Quality | None = None
    free: bool = False
    tail: Quality | None = None

    @classmethod
    def of(cls, model: ModelSpec, technique: str, setting: str) -> "Cost":
        """By the nearest figures that there are."""
        return cls(find(model, technique, setting), tail=find_tail(model, technique, setting))

    @property
    def percent(self) -> float | None:
        """The loss in percent; None where nothing comparable is known."""
        if self.free:
            return 0.0
        return None if self.figure is None else self.figure.cost_percent

    def __str__(self) -> str:
        if self.free:
            return "no loss"
        known = [str(figure) for figure in (self.figure, self.tail) if figure is not None]
        return "; ".join(known) or "no figure"


FREE = Cost(free=True)


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
    cost = _plain_cost(recipe, recipe.execution.dtype) if plain else _weights_cost(recipe, asked)
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
    bare = replace(recipe, techniques=_without(recipe.techniques, ("quantization",)))
    for weights in engine.makes(recipe.device):
        if weights in TERNARY:
            continue
        if weights not in DTYPE_BYTES:
            cost = _weights_cost(recipe, weights)
        elif (weights, recipe.execution.dtype) == ("bf16", "fp32"):
            cost = _plain_cost(recipe, weights)
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


def _weights_cost(recipe: Recipe, weights: str) -> Cost:
    if weights == "none":
        return FREE
    served = recipe.execution.engine not in _OWN_ENGINES
    setting = _SERVED_FORMATS.get(weights, weights) if served else weights
    return Cost.of(recipe.model, "weights", setting)


def _plain_cost(recipe: Recipe, dtype: str) -> Cost:
    """A format as wide as the checkpoint's loses nothing."""
    model = recipe.model
    if model.prequantized or DTYPE_BYTES[dtype] >= DTYPE_BYTES.get(model.dtype, 4):
        return FREE
    return Cost.of(model, "weights", dtype)


def _asked_kv(recipe: Recipe) -> Setting:
    execution = recipe.execution
    return _asked(_kv_cost(recipe.model, execution.kv_dtype, execution.dtype))


def _kv_dtypes(recipe: Recipe) -> Iterator[Setting]:
    """The engine's narrower formats, one of each width; of ours int8 only where there is a figure
    of what it costs, and fp8 never: it takes as many bytes and is less exact."""
    execution = recipe.execution
    is_ours = execution.engine == "ullage"
    seen_bits = {KV_BITS[execution.kv_dtype]}
    for name in ENGINES[execution.engine].kv_dtypes:
        bits = KV_BITS[name]
        if bits < KV_BITS[execution.kv_dtype] and bits not in seen_bits:
            cost = _kv_cost(recipe.model, name, execution.dtype)
            if is_ours and (name == "fp8" or (name == "int8" and cost.figure is None)):
                continue
            seen_bits.add(bits)
            yield _executed(f"--kv-cache-dtype {name}", cost, kv_dtype=name)


def _kv_cost(model: ModelSpec, kv_dtype: str, dtype: str) -> Cost:
    if KV_BITS[kv_dtype] >= KV_BITS[dtype]:
        return FREE
    return Cost.of(model, "kv", kv_dtype)


def _asked_sparsity(recipe: Recipe) -> Setting:
    for choice in techniques.settled(recipe).techniques:
        if choice.name in ("dms", "camelot"):
            return _asked(_sparsity_cost(recipe.model, choice), runs=_runs(choice))
    return _asked()


def _sparsity(recipe: Recipe) -> Iterator[Setting]:
    for choice in SPARSITY:
        technique = techniques.create(choice)
        here = recipe.execution.engine in technique.engines
        if here and technique.unsupported(recipe.model) is None:
            cost = _sparsity_cost(recipe.model, choice)
            yield Setting(f"--technique {as_typed(choice)}", _with(choice), cost, technique.runs)


def _with(choice: TechniqueChoice) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, techniques=(*recipe.techniques, choice))


def _sparsity_cost(model: ModelSpec, choice: TechniqueChoice) -> Cost:
    """By the first setting; a figure counts where the others are as usual."""
    technique = techniques.create(choice)
    first, *others = asdict(technique).items()
    usual = asdict(type(technique)())
    told = [first, *(pair for pair in others if usual[pair[0]] != pair[1])]
    return Cost.of(model, choice.name, ",".join(f"{key}={value}" for key, value in told))


def _runs(choice: TechniqueChoice) -> bool:
    return techniques.create(choice).runs


def _without(
    choices: tuple[TechniqueChoice, ...], names: tuple[str, ...]
) -> tuple[TechniqueChoice, ...]:
    return tuple(choice for choice in choices if choice.name not in names)


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
