"""The recipe and the workload that options describe."""

from dataclasses import dataclass, replace
from pathlib import Path

from ullage import techniques
from ullage.cli.options import DEFAULT_OUTPUT_TOKENS, NamedRecipe
from ullage.errors import InputError
from ullage.planner import default_execution
from ullage.planner.engines import ENGINES
from ullage.planner.search import Freedom
from ullage.specs.calibration import Calibration, read_calibration
from ullage.specs.device import Device, find_device
from ullage.specs.dtypes import dtype_name, kv_dtype_name
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.workload import Attention, Engine, Execution, Workload
from ullage.techniques.dms.adapter import ADAPTERS
from ullage.units import format_bytes, parse_bytes, parse_tokens


@dataclass(frozen=True)
class PlanOptions:
    """The plan options as they were typed."""

    device: str | None = None
    memory: str | None = None
    weights: str | None = None
    kv_cache_dtype: str | None = None
    attention: Attention | None = None
    prefill_chunk: int | None = None
    technique: tuple[str, ...] = ()
    engine: Engine = "ullage"
    calibration: Path | None = None
    engine_version: str = ""
    max_num_seqs: int | None = None
    tp: int = 1
    pp: int = 1
    utilization: float | None = None

    def with_recipe(self, name: NamedRecipe | None, model: ModelSpec) -> "PlanOptions":
        """These options, and what `name` stands for where they leave it open.

        Raises:
            InputError: an engine that has no such recipe.
        """
        if name is None:
            return self
        if self.engine != "ullage":
            raise InputError(f"--recipe {name} is ullage's own, which {self.engine} does not have.")
        asked = {text.partition(":")[0] for text in self.technique}
        weights = self.weights if self.weights or "quantization" in asked else "nf4"
        added = () if asked & {"dms", "camelot"} else (_sparse(model),)
        return replace(self, weights=weights, technique=(*self.technique, *added))

    def find_device(self) -> Device:
        """The device that is named, or this machine."""
        return find_device(self.device)

    def budget_bytes(self, device: Device) -> int:
        """The budget inside `device`.

        Raises:
            InputError: a budget larger than the device.
        """
        if self.memory is None:
            return device.memory_bytes
        budget_bytes = parse_bytes(self.memory, whole_bytes=device.memory_bytes)
        if budget_bytes > device.memory_bytes:
            raise InputError(
                f"--memory {self.memory} is more than {device.name} has "
                f"({format_bytes(device.memory_bytes)})."
            )
        return budget_bytes

    def freedom(self) -> Freedom:
        """What a search may change: whatever was not asked for."""
        asked = {text.partition(":")[0] for text in self.technique}
        return Freedom(
            weights=self.weights is None and "quantization" not in asked,
            kv_dtype=self.kv_cache_dtype is None,
            prefill_chunk=self.prefill_chunk is None,
            sparsity=not asked & {"dms", "camelot"},
            max_num_seqs=self.max_num_seqs is None,
            tensor_parallel=self.tp == 1,
        )

    def recipe(self, model: ModelSpec, device: Device, workload: Workload) -> Recipe:
        """The recipe that the options describe; defaults are the device's.

        Raises:
            InputError: an option with a value that there is not.
            TechniqueError: an unknown technique or setting.
        """
        chosen = [techniques.parse(text) for text in self.technique]
        choices = tuple(techniques.choice_of(technique) for technique in chosen)
        recipe = Recipe(model, device, workload, self._execution(device), choices)
        recipe = self._with_formats(recipe)
        _refuse_twice(recipe.techniques)
        return recipe

    def read_calibration(self) -> Calibration | None:
        """The calibration that is named, if any."""
        return None if self.calibration is None else read_calibration(self.calibration)

    def _execution(self, device: Device) -> Execution:
        default = default_execution(device, self.engine)
        chunk = default.prefill_chunk if self.prefill_chunk is None else self.prefill_chunk
        return replace(
            default,
            attention=self._attention() or default.attention,
            prefill_chunk=chunk,
            engine_version=self.engine_version,
            max_num_seqs=self.max_num_seqs,
            utilization=self.utilization,
            tensor_parallel=self.tp,
            pipeline_parallel=self.pp,
        )

    def _attention(self) -> Attention | None:
        known = ENGINES[self.engine].attentions
        if self.attention is not None and self.attention not in known:
            raise _unknown("--attention", self.attention, self.engine, known)
        return self.attention

    def _with_formats(self, recipe: Recipe) -> Recipe:
        engine = ENGINES[self.engine]
        if self.weights is not None:
            weights = dtype_name(self.weights) or self.weights.lower()
            if weights not in engine.weights:
                raise _unknown("--weights", self.weights, self.engine, engine.weights)
            recipe = engine.with_weights(recipe, weights)
        if self.kv_cache_dtype in (None, "auto"):
            return recipe
        kv_dtype = kv_dtype_name(self.kv_cache_dtype)
        if kv_dtype not in engine.kv_dtypes:
            raise _unknown("--kv-cache-dtype", self.kv_cache_dtype, self.engine, engine.kv_dtypes)
        if self.engine == "ullage" and self.kv_cache_dtype.lower() == "fp8_e5m2":
            raise InputError(f"--kv-cache-dtype {self.kv_cache_dtype!r}: ullage's fp8 is fp8_e4m3.")
        return replace(recipe, execution=replace(recipe.execution, kv_dtype=kv_dtype))


def _sparse(model: ModelSpec) -> str:
    """DMS as `model` does best with it: with an adapter at a quarter of the bytes, as was measured;
    at half what it brings to perplexity few-shot prompts lose (docs/dms.md)."""
    shipped = model.name in ADAPTERS.names() and not ADAPTERS.load(model.name).unsuited(model)
    with_it = f"dms:kept=0.1,window=1270,predictor=linear,adapter={model.name}"
    return with_it if shipped else "dms"


def workload_of(
    model: ModelSpec, max_model_len: str | None, output_len: str | None, sequences: int
) -> Workload:
    """The workload that the options describe.

    Raises:
        InputError: more output than the whole length.
    """
    total = model.max_context_tokens if max_model_len is None else parse_tokens(max_model_len)
    if output_len is None:
        output = min(DEFAULT_OUTPUT_TOKENS, max(1, total // 2))
    else:
        output = parse_tokens(output_len)
    if output >= total:
        raise InputError(
            f"--output-len {output:,} leaves no room for a prompt in {total:,} tokens."
        )
    return Workload(total - output, output, sequences)


def _unknown(option: str, text: str, engine: Engine, known: tuple[str, ...]) -> InputError:
    return InputError(f"{option} {text!r}: {engine} has {', '.join(known)}.")


def _refuse_twice(choices: tuple[TechniqueChoice, ...]) -> None:
    names = [choice.name for choice in choices]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{', '.join(sorted(twice))} is asked for twice: once is enough.")
