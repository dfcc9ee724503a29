"""How far a recipe reaches in one direction: the last size whose peak is inside the budget.

Peaks are nearly straight lines over sizes, so that a guess by interpolation lands beside the edge;
bisection then finds it exactly.
"""

from collections.abc import Callable
from dataclasses import replace

from ullage.specs.plan import Recipe
from ullage.techniques import most_tokens

MOST_SEQUENCES = 1 << 16
_NEAR = (0, 1, 20, -20)  # sizes around a guess: blocks of 16 tokens make stairs of the line

Peak = Callable[[Recipe], int]


def longest_context(recipe: Recipe, at_bytes: int, budget_bytes: int, peak: Peak) -> int:
    """Tokens of the longest context that fits and that can be read. `recipe` fits and its peak
    is `at_bytes`."""
    work = recipe.workload

    def bytes_at(prompt_tokens: int) -> int:
        return peak(replace(recipe, workload=replace(work, prompt_tokens=prompt_tokens)))

    most = max(work.prompt_tokens, most_tokens(recipe) - work.output_tokens)
    found = last_that_fits(bytes_at, work.prompt_tokens, at_bytes, most, budget_bytes)
    return found + work.output_tokens


def most_sequences(recipe: Recipe, at_bytes: int, budget_bytes: int, peak: Peak) -> int:
    """The most sequences that fit, the server's own limit at most."""
    work = recipe.workload

    def bytes_at(sequences: int) -> int:
        return peak(replace(recipe, workload=replace(work, sequences=sequences)))

    most = max(work.sequences, recipe.execution.max_num_seqs or MOST_SEQUENCES)
    return last_that_fits(bytes_at, work.sequences, at_bytes, most, budget_bytes)


def last_that_fits(
    bytes_at: Callable[[int], int], low: int, low_bytes: int, most: int, budget_bytes: int
) -> int:
    """The largest size from `low`, which fits with `low_bytes`, to `most` that fits."""
    if low == most or (high_bytes := bytes_at(most)) <= budget_bytes:
        return most
    high = most
    slope = (high_bytes - low_bytes) / (high - low)
    guess = low + int((budget_bytes - low_bytes) / slope)
    for near in (guess + offset for offset in _NEAR):
        if low < near < high:
            low, high = (near, high) if bytes_at(near) <= budget_bytes else (low, near)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_at(middle) <= budget_bytes else (low, middle)
    return low
