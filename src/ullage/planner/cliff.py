"""The cliff: the largest context and the largest batch that still fit."""

from collections.abc import Callable
from dataclasses import replace

from ullage.planner.memory import peak_bytes
from ullage.planner.reach import last_that_fits
from ullage.specs.calibration import Calibration
from ullage.specs.plan import Cliff, Recipe
from ullage.specs.workload import Execution

# What fits at 2^40 tokens or sequences does not grow with them.
_NO_LIMIT = 1 << 40


def find_cliff(recipe: Recipe, budget_bytes: int, calibration: Calibration | None) -> Cliff:
    """The cliff in both directions from `recipe`: peaks never fall as sizes grow."""
    work = recipe.workload

    def bytes_at(prompt_tokens: int, sequences: int) -> int:
        sized = replace(work, prompt_tokens=prompt_tokens, sequences=sequences)
        larger = replace(recipe, workload=sized, execution=_allowing(recipe.execution, sequences))
        return peak_bytes(larger, calibration)

    longest_prompt = _largest(lambda tokens: bytes_at(tokens, work.sequences), budget_bytes)
    most_sequences = _largest(lambda count: bytes_at(work.prompt_tokens, count), budget_bytes)
    return Cliff(
        max_model_len=longest_prompt and longest_prompt + work.output_tokens,
        max_num_seqs=most_sequences,
    )


def _allowing(execution: Execution, sequences: int) -> Execution:
    """With a server's limit of sequences, for which it keeps room, raised where it is too low."""
    limit = execution.max_num_seqs
    return execution if limit is None else replace(execution, max_num_seqs=max(limit, sequences))


def _largest(bytes_at: Callable[[int], int], budget_bytes: int) -> int | None:
    """The largest size from 1 that fits; 0 when none does, None when all do."""
    least_bytes = bytes_at(1)
    if least_bytes > budget_bytes:
        return 0
    found = last_that_fits(bytes_at, 1, least_bytes, _NO_LIMIT, budget_bytes)
    return None if found == _NO_LIMIT else found
