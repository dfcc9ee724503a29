"""What to change in llama.cpp's cache and batch, by what the log's figures hold."""

from dataclasses import replace

from ullage.doctor.diagnosis import Change, Run
from ullage.units import format_bytes

_PAD_TOKENS = 256  # llama.cpp rounds a context up to a multiple of it
_DEFAULT_TOKENS = 8192  # of a context, where the log names none: assumed


def smaller_cache(run: Run, cache_bytes: int | None) -> tuple[Change, ...]:
    """A KV cache of 8.5 bits a number instead of 16, unless it is quantized already."""
    if run.kv_dtype.startswith("q"):
        return ()
    freed = cache_bytes * 15 // 32 if cache_bytes else None  # q8_0: 34 bytes of 64
    return (Change("-ctk q8_0 -ctv q8_0 -fa on", "8.5 bits a KV number instead of 16", freed),)


def less_context(run: Run, cache_bytes: int | None) -> tuple[Change, ...]:
    """Half of the context; it frees half of the cache's `cache_bytes`."""
    half = (run.max_model_len or _DEFAULT_TOKENS) // 2
    freed = cache_bytes // 2 if cache_bytes else None
    return (Change(f"-c {max(_PAD_TOKENS, half)}", "half of the context", freed),)


def smaller_batch(run: Run, buffer_bytes: int | None) -> tuple[Change, ...]:
    """Half of the micro-batch; it frees half of the compute buffer's `buffer_bytes`."""
    ubatch = max(32, (run.prefill_chunk or 512) // 2)
    freed = buffer_bytes // 2 if buffer_bytes else None
    return (Change(f"-ub {ubatch}", "the compute buffer grows with the micro-batch", freed),)


def fitting_cache(run: Run, cache_bytes: int | None, left_bytes: int | None) -> tuple[Change, ...]:
    """What makes a cache of `cache_bytes` fit into `left_bytes`, a tenth of them apart for the
    compute buffer; smaller entries go last where they are not enough alone. None: not known."""
    smaller = smaller_cache(run, cache_bytes)
    if not cache_bytes or left_bytes is None:
        return (*smaller, *less_context(run, cache_bytes))
    shorter = _fitting_context(run, cache_bytes, left_bytes)
    if cache_bytes * 17 // 32 <= _usable(left_bytes):
        return (*smaller, *shorter)
    return (*shorter, *(replace(one, why=f"{one.why}, not enough alone") for one in smaller))


def _fitting_context(run: Run, cache_bytes: int, left_bytes: int) -> tuple[Change, ...]:
    """Half of the context, or the longest whose cache fits; none where not a block of it does."""
    context, usable_bytes = run.max_model_len or 0, _usable(left_bytes)
    if cache_bytes // 2 <= usable_bytes:
        return less_context(run, cache_bytes)
    tokens = context * usable_bytes // cache_bytes // _PAD_TOKENS * _PAD_TOKENS
    if tokens == 0:
        return ()
    why = f"the longest whose cache fits into {format_bytes(left_bytes)}, a tenth apart"
    return (Change(f"-c {tokens}", why, cache_bytes * (context - tokens) // context),)


def _usable(left_bytes: int) -> int:
    return left_bytes * 9 // 10
