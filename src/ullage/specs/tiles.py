"""How much of a sequence's past attention takes at once: one arithmetic for the planner and the
kernels."""

TILE_TOKENS = 1024  # stored entries
LEAST_TILE_TOKENS = 128  # below it, joining tiles would cost more than attending to them
SCORE_NUMBERS = 4 << 20  # 16 MiB of fp32: the scores of one tile, unless it is the least


def tile_tokens(rows: int) -> int:
    """Stored entries that a kernel scores at once against `rows` queries, all heads counted."""
    return min(TILE_TOKENS, max(LEAST_TILE_TOKENS, SCORE_NUMBERS // rows))


def tile_scores(rows: int, tokens: int) -> int:
    """Numbers in the scores of the largest tile of `tokens` entries: never falls as either
    grows."""
    return min(rows * min(tokens, TILE_TOKENS), max(SCORE_NUMBERS, rows * LEAST_TILE_TOKENS))
