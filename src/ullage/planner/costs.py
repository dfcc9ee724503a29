"""What a choice costs in quality, by the nearest figures that there are."""

from dataclasses import asdict, dataclass

from ullage import techniques
from ullage.specs.dtypes import DTYPE_BYTES, KV_BITS
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.quality import Quality, find, find_tail

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


def weights_cost(recipe: Recipe, weights: str) -> Cost:
    """Of quantized weights in a format, by its engine's name."""
    if weights == "none":
        return FREE
    served = recipe.execution.engine not in _OWN_ENGINES
    setting = _SERVED_FORMATS.get(weights, weights) if served else weights
    return Cost.of(recipe.model, "weights", setting)


def plain_cost(recipe: Recipe, dtype: str) -> Cost:
    """Of unquantized weights in `dtype`: as wide as the checkpoint's it loses nothing."""
    model = recipe.model
    if model.prequantized or DTYPE_BYTES[dtype] >= DTYPE_BYTES.get(model.dtype, 4):
        return FREE
    return Cost.of(model, "weights", dtype)


def kv_cost(model: ModelSpec, kv_dtype: str, dtype: str) -> Cost:
    """Of KV entries in a format: as wide as the arithmetic's it loses nothing."""
    if KV_BITS[kv_dtype] >= KV_BITS[dtype]:
        return FREE
    return Cost.of(model, "kv", kv_dtype)


def sparsity_cost(model: ModelSpec, choice: TechniqueChoice) -> Cost:
    """Of a technique for KV entries, by its first setting; a figure counts where the others are as
    usual."""
    technique = techniques.create(choice)
    first, *others = asdict(technique).items()
    usual = asdict(type(technique)())
    told = [first, *(pair for pair in others if usual[pair[0]] != pair[1])]
    return Cost.of(model, choice.name, ",".join(f"{key}={value}" for key, value in told))
