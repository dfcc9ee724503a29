"""The cliff: the largest context and the largest batch that still fit."""

from collections.abc import Callable
from dataclasses import replace

from ullage.planner.memory import peak_bytes
from ullage.specs.calibration import Calibration
from ullage.specs.plan import Cliff, Recipe
from ullage.specs.workload import Execution

# What fits at 2^40 tokens or sequences does not grow with them.
_NO_LIMIT = 1 << 40


def find_cliff(recipe: Recipe, budget_bytes: int, calibration: Calibration | None) -> Cliff:
    """The cliff in both directions from `recipe`. Peaks never fall as sizes grow, so bisection
    finds it."""
    work = recipe.workload

    def fits(prompt_tokens: int, sequences: int) -> bool:
        sized = replace(work, prompt_tokens=prompt_tokens, sequences=sequences)
        larger = replace(recipe, workload=sized, execution=_allowing(recipe.execution, sequences))
        return peak_bytes(larger, calibration) <= budget_bytes

    longest_prompt = _largest(lambda tokens: fits(tokens, work.sequences))
    return Cliff(
        max_model_len=longest_prompt and longest_prompt + work.output_tokens,
        max_num_seqs=_largest(lambda sequences: fits(work.prompt_tokens, sequences)),
    )


def _allowing(execution: Execution, sequences: int) -> Execution:
    """With a server's limit of sequences, for which it keeps room, raised where it is too low."""
    limit = execution.max_num_seqs
    return execution if limit is None else replace(execution, max_num_seqs=max(limit, sequences))


def _largest(fits: Callable[[int], bool]) -> int | None:
    """The largest n >= 1 for which `fits` holds; 0 when it holds for none, None for all."""
    low, high = 0, 1
    while fits(high):
        if high >= _NO_LIMIT:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
