"""The options that plan, run and audit share, and the recipe that they describe."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ullage import techniques
from ullage.errors import InputError
from ullage.planner import default_execution
from ullage.planner.search import Freedom
from ullage.specs.calibration import Calibration, read_calibration
from ullage.specs.device import Device, find_device
from ullage.specs.dtypes import DTYPE_BYTES, dtype_name
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.workload import Attention, Engine, Execution, Workload
from ullage.units import format_bytes, parse_bytes, parse_tokens

DEFAULT_OUTPUT_TOKENS = 256

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A catalog name, a local folder, a config.json, a .gguf file, or a hub id.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME|SIZE", help="A catalog name or a size. Default: this machine."
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="A budget inside the device: 20GiB, 900MiB, 80%."
    ),
]
MaxModelLenOption = Annotated[
    str | None,
    typer.Option(
        "--max-model-len",
        metavar="TOKENS",
        help="Prompt and output together: 8192, 32K. Default: the model's context.",
    ),
]
MaxNumSeqsOption = Annotated[
    int, typer.Option("--max-num-seqs", min=1, help="Sequences at the same time.")
]
OutputLenOption = Annotated[
    str | None,
    typer.Option(
        "--output-len",
        metavar="TOKENS",
        help=f"Of these, tokens written. Default: {DEFAULT_OUTPUT_TOKENS}.",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="fp32|bf16|int8|nf4",
        help="Format of the weights. Default: bf16 on accelerators, fp32 on CPU.",
    ),
]
KvOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        metavar="fp32|bf16|fp16",
        help="Format of the KV entries. Default: that of the arithmetic.",
    ),
]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        "--attention",
        help="eager builds the score matrix, quadratic in the prompt; the others do not.",
    ),
]
ChunkOption = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk", min=0, help="Prompt tokens a forward pass; 0: all at once. Default: 512."
    ),
]
TechniqueOption = Annotated[
    list[str] | None,
    typer.Option(
        "--technique", metavar="NAME:key=value", help="A memory technique; may be given again."
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="Whose memory is planned: ullage's own engine, or transformers' generate.",
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Figures of this machine, written by `ullage audit`."),
]


@dataclass(frozen=True)
class PlanOptions:
    """The plan options as they were typed."""

    device: str | None = None
    memory: str | None = None
    weights: str | None = None
    kv_cache_dtype: str | None = None
    attention: Attention = "sdpa"
    prefill_chunk: int | None = None
    technique: tuple[str, ...] = ()
    engine: Engine = "ullage"
    calibration: Path | None = None

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
        quantized = any(text.partition(":")[0] == "quantization" for text in self.technique)
        return Freedom(
            weights=self.weights is None and not quantized,
            kv_dtype=self.kv_cache_dtype is None,
            prefill_chunk=self.prefill_chunk is None,
        )

    def recipe(self, model: ModelSpec, device: Device, workload: Workload) -> Recipe:
        """The recipe that the options describe; defaults are the device's.

        Raises:
            InputError: an option with a value that there is not.
            TechniqueError: an unknown technique or setting.
        """
        chosen = [techniques.parse(text) for text in self.technique]
        choices = tuple(techniques.choice_of(technique) for technique in chosen)
        if self.weights in ("int8", "nf4"):
            choices = (TechniqueChoice("quantization", {"scheme": self.weights}), *choices)
        _refuse_twice(choices)
        return Recipe(model, device, workload, self._execution(device), choices)

    def read_calibration(self) -> Calibration | None:
        """The calibration that is named, if any."""
        return None if self.calibration is None else read_calibration(self.calibration)

    def _execution(self, device: Device) -> Execution:
        execution = default_execution(device)
        if self.weights is not None and self.weights not in ("int8", "nf4"):
            dtype = _dtype("--weights", self.weights, "fp32, bf16, int8 or nf4")
            execution = replace(execution, dtype=dtype, kv_dtype=dtype)
        if self.kv_cache_dtype not in (None, "auto"):
            kv_dtype = _dtype("--kv-cache-dtype", self.kv_cache_dtype, ", ".join(DTYPE_BYTES))
            execution = replace(execution, kv_dtype=kv_dtype)
        execution = replace(execution, attention=self.attention, engine=self.engine)
        if self.prefill_chunk is not None:
            execution = replace(execution, prefill_chunk=self.prefill_chunk)
        elif self.engine == "transformers":  # generate reads the whole prompt at once
            execution = replace(execution, prefill_chunk=0)
        return execution


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


def _dtype(option: str, text: str | None, known: str) -> str:
    name = dtype_name(text or "")
    if name is None:
        raise InputError(f"{option} is {known}, not {text!r}.")
    return name


def _refuse_twice(choices: tuple[TechniqueChoice, ...]) -> None:
    names = [choice.name for choice in choices]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{', '.join(sorted(twice))} is asked for twice: once is enough.")
