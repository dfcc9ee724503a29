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


# Attention in splits, on a GPU:
SPLIT_PROGRAMS = 512  # assumed enough: a large GPU's 132 multiprocessors run a few each
LEAST_SPLIT_TOKENS = 256  # below it, joining splits would cost more than attending to them
_FEW_ROWS, _MANY_ROWS = 16, 64  # rows of a program's tile: what its matrix instructions take


def split_rows(rows: int) -> int:
    """Rows that a program takes at once, of the `rows` of a KV head: its query heads at every new
    token."""
    return _FEW_ROWS if rows <= _FEW_ROWS else _MANY_ROWS


def split_tokens(tokens: int, rows: int) -> int:
    """Stored entries of a split, where all KV heads together have `tokens`, and `rows` rows each:
    there are no more splits than one for each head and `SPLIT_PROGRAMS`, tiles of rows counted."""
    tiles = -(-rows // split_rows(rows))
    return max(LEAST_SPLIT_TOKENS, -(-tokens * tiles // SPLIT_PROGRAMS))
