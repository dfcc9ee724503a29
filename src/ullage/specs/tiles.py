"""How much of a sequence's past attention takes at once: one arithmetic for the planner and the
kernels."""

TILE_TOKENS = 1024  # stored entries
LEAST_TILE_TOKENS = 128  # below it, joining tiles would cost more than attending to them
THREADS = 8  # of a CPU that read entries side by side: what bounds decode is the memory's speed
SCORE_NUMBERS = 4 << 20  # 16 MiB of fp32: the scores of one tile, unless it is the least


def tile_tokens(rows: int) -> int:
    """Stored entries that a kernel scores at once against `rows` queries, all heads counted."""
    return min(TILE_TOKENS, max(LEAST_TILE_TOKENS, SCORE_NUMBERS // rows))


def tile_scores(rows: int, tokens: int) -> int:
    """Numbers in the scores of the largest tile of `tokens` entries: never falls as either
    grows."""
    return min(rows * min(tokens, TILE_TOKENS), max(SCORE_NUMBERS, rows * LEAST_TILE_TOKENS))


# Where the past is split over a GPU's multiprocessors. A KV head's queries are rows: its query
# heads at every new token.
SPLIT_PROGRAMS = 512  # assumed enough: a large GPU's 132 multiprocessors run a few each
LEAST_SPLIT_TOKENS = 256  # below it, joining splits would cost more than attending to them


def split_rows(rows: int) -> int:
    """Of a KV head's `rows`, as many as a program takes: as its matrix instructions do."""
    return 16 if rows <= 16 else 64


def split_tokens(rows: int, tokens: int) -> int:
    """Stored entries of a split, where each KV head has `rows` and all together have `tokens`."""
    tiles = -(-rows // split_rows(rows))
    return max(LEAST_SPLIT_TOKENS, -(-tokens * tiles // SPLIT_PROGRAMS))


def rows_of_splits(rows: int, tokens: int, lists: int) -> int:
    """No fewer rows than all splits have together, where KV heads keep `tokens` in `lists` lists,
    each split by itself: never falls as anything grows."""
    whole = min(rows * (tokens // LEAST_SPLIT_TOKENS), SPLIT_PROGRAMS * split_rows(rows))
    return whole + rows * lists  # and a last, shorter one of each list
