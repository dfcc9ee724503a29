"""What is asked of a model, and how it is to be executed."""

from dataclasses import dataclass
from typing import Literal

Engine = Literal["ullage", "transformers", "vllm", "sglang", "llama.cpp"]
Attention = Literal["eager", "sdpa", "flash"]
PhaseName = Literal["load", "prefill", "decode"]
PHASES: tuple[PhaseName, ...] = ("load", "prefill", "decode")


@dataclass(frozen=True)
class Workload:
    """`sequences` at a time, each of `prompt_tokens` followed by `output_tokens`."""

    prompt_tokens: int
    output_tokens: int
    sequences: int = 1

    @property
    def context_tokens(self) -> int:
        """Tokens that one sequence holds at its full length."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Execution:
    """How the model runs.

    `dtype` is the format of unquantized weights and of the arithmetic, `kv_dtype` that of stored KV
    entries. `prefill_chunk` is in tokens; 0 reads the whole prompt in one forward pass: vLLM's
    ``--max-num-batched-tokens``, llama.cpp's ``--ubatch-size``. An `engine_version` of "" is the
    newest that there are constants of. `max_num_seqs` is the engine's own limit of sequences in a
    step, and `utilization` the share of a device that it lets itself take; None is its default.
    `tensor_parallel` times `pipeline_parallel` devices hold one copy of the model.
    """

    engine: Engine = "ullage"
    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    attention: Attention = "sdpa"
    prefill_chunk: int = 512
    engine_version: str = ""
    max_num_seqs: int | None = None
    utilization: float | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


@dataclass(frozen=True)
class Step:
    """One forward pass at its largest: what a technique's arithmetic is asked about.

    `sequences` hold KV entries, `held_tokens` each; `new_tokens` go through the layers in this
    pass, over all sequences together.
    """

    phase: PhaseName
    sequences: int
    held_tokens: int
    new_tokens: int
    execution: Execution
