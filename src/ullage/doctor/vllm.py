"""vLLM: a healthy start, a start that failed, and an engine that a request has killed."""

from collections.abc import Callable
from dataclasses import replace

from ullage.doctor import torch_cuda
from ullage.doctor.diagnosis import Change, Culprit, Diagnosis, Phase, evidence
from ullage.doctor.frames import Place, place_of
from ullage.doctor.log import Found, Log
from ullage.doctor.vllm_changes import (
    changes_at,
    fewer_rows,
    lower_share,
    raise_share,
    shorter,
    smaller_entries,
    smaller_start,
    usual_share,
)
from ullage.doctor.vllm_facts import BLOCKS, TOKENS, Start, read_start
from ullage.units import GIB, format_bytes

WORDS = (
    "LLM engine", "vLLM API server", "vllm/", "KV cache memory", "KV cache size", "for KV Cache",
    "KV cache is", "stored in KV", "EngineDead", "EngineCore encountered", "EngineCore failed",
    "initialization failed", "dummy requests", "max_num_", "max_model_len", "max_seq_len",
    "max model len", "max seq len", "args: ",
    " version ", "memory_utilization", "memory utilization", "memory-utilization", "cache blocks",
    "U blocks", "A blocks", "cuda blocks", "Model loading took", "model weights t",
    "non_torch_memory", "non-torch", "total_memory=", "total_gpu_memory", "activation peak",
    "Maximum concurrency", "Graph capturing", "CUDAGraph", "CUDA graph pool", "maximum model len",
    "available_kv_cache_memory", "500 Internal", "prompt_logprobs",
)  # fmt: skip

_BUSY = (
    r"Free memory on device (?:\S+ )?\({free%}/{total%} GiB\) on startup is less than "
    r"desired GPU memory utilization \((?P<share>[01](?:\.\d{1,6})?), {wanted}\)"
)
_SAMPLER = r"out of memory occurred when warming up sampler with {rows#} dummy requests"
_NO_POOL = r"No available memory for the cache blocks"
_SMALL_POOL = (
    r"max seq len \({context#}\),? \(?{wanted} KV cache is needed, which is larger than the "
    r"available KV cache memory \({free}\)"
)
_ESTIMATE = r"estimated maximum model length is {context#}"
_FEW_TOKENS = (
    r"max seq len \({context#}\) is larger than the maximum number of tokens that can be stored "
    r"in KV cache \({tokens#}\)"
)
_DEAD = r"EngineDeadError|EngineCore encountered a fatal error|AsyncEngineDeadError"
_NOT_STARTED = r"Engine core initialization failed|EngineCore failed to start"
_ANSWERS = r"500 Internal Server Error"
_OUT = r"(?:CUDA|HIP) error: out of memory|OutOfMemoryError|(?:CUDA|HIP|XPU) out of memory"


def recognise(log: Log) -> Diagnosis | None:
    """What vLLM's log shows, or None if it is none."""
    start = read_start(log)
    if start is None:
        return None
    for failure in _FAILURES:
        found = failure(log, start)
        if found is not None:
            return found
    return _healthy(log, start)


def _base(start: Start, happened: str, **more: object) -> Diagnosis:
    diagnosis = Diagnosis(
        happened=happened,
        failed=True,
        engine="vllm",
        engine_version=start.version,
        parts=start.parts(),
        total_bytes=start.total_bytes,
        run=start.run,
    )
    return replace(diagnosis, **more)  # type: ignore[arg-type]


def _busy(log: Log, start: Start) -> Diagnosis | None:
    found = log.first(_BUSY)
    if found is None:
        return None
    free_bytes, total_bytes = (round(found.number(name) * GIB) for name in ("free", "total"))
    share = int(free_bytes * 100 / max(1, total_bytes)) / 100
    held = total_bytes - free_bytes
    return _base(
        start,
        f"vLLM wants {found.text('wanted')} of the device, and only {format_bytes(free_bytes)} of "
        f"{format_bytes(total_bytes)} was free before it started.",
        phase="load",
        culprit="other process",
        wanted_bytes=found.size("wanted"),
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        causes=(f"Others hold {format_bytes(held)}: another process, or one that did not end.",),
        changes=(
            Change("nvidia-smi", "shows who holds the device: stop it", held),
            Change(
                f"--gpu-memory-utilization {share:.2f}",
                "asks for no more than is free; the KV pool shrinks by the difference",
            ),
        ),
        evidence=evidence(found),
    )


def _sampler(log: Log, start: Start) -> Diagnosis | None:
    """`max_num_seqs` rows of a whole vocabulary, after the KV pool has been taken."""
    found = log.first(_SAMPLER)
    if found is None:
        return None
    rows, refused = found.count("rows"), torch_cuda.refusal(log)
    changes = (fewer_rows(rows, refused), *lower_share(start, refused))
    return torch_cuda.with_refusal(
        _base(
            start,
            f"vLLM ran out of memory while it warmed up its sampler with {rows:,} sequences, after "
            f"the KV pool and the CUDA graphs had been taken.",
            phase="profile",
            culprit="logits",
            causes=(
                "The sampler's tensors have a row of the whole vocabulary for each of "
                "max_num_seqs sequences.",
            ),
            changes=changes,
            evidence=evidence(found, start.graphs, start.pool),
        ),
        refused,
    )


def _no_pool(log: Log, start: Start) -> Diagnosis | None:
    found = log.first(_NO_POOL)
    if found is None:
        return None
    missing = max(0, -(start.pool_bytes or 0))
    weights, activation = start.size(start.weights), start.size(start.activation)
    culprit: Culprit = "activation" if activation > weights else "weights"
    return _base(
        start,
        "Nothing is left for KV entries after the weights and the profiling pass"
        + (f": {format_bytes(missing)} are missing." if missing else "."),
        phase="profile",
        culprit=culprit,
        wanted_bytes=missing or None,
        free_bytes=0,
        changes=(*usual_share(start, missing), *smaller_start(start)),
        evidence=evidence(found, start.weights, start.activation, start.pool),
    )


def _small_pool(log: Log, start: Start) -> Diagnosis | None:
    found = log.first(_SMALL_POOL)
    if found is None:
        return None
    wanted, free = found.size("wanted"), found.size("free")
    estimate = log.first(_ESTIMATE)
    scaled = found.count("context") * free // max(1, wanted)
    fitting = estimate.count("context") if estimate else scaled
    return _base(
        start,
        f"One request of {found.count('context'):,} tokens needs {format_bytes(wanted)} of KV "
        f"entries; the pool has {format_bytes(free)}.",
        phase="profile",
        culprit="kv",
        wanted_bytes=wanted,
        free_bytes=free,
        changes=(
            *raise_share(start, wanted - free),
            *shorter(fitting),
            *smaller_entries(start, wanted, free),
        ),
        evidence=evidence(found, estimate, start.pool),
    )


def _few_tokens(log: Log, start: Start) -> Diagnosis | None:
    found = log.first(_FEW_TOKENS)
    if found is None:
        return None
    context, tokens = found.count("context"), found.count("tokens")
    per_token = (start.pool_bytes or 0) / max(1, tokens)
    wanted = round(per_token * context) or None
    return _base(
        start,
        f"One request of {context:,} tokens is longer than the {tokens:,} that the KV pool holds.",
        phase="profile",
        culprit="kv",
        wanted_bytes=wanted,
        free_bytes=start.pool_bytes,
        changes=(
            *raise_share(start, round(per_token * (context - tokens))),
            *shorter(tokens),
            *smaller_entries(start, wanted, start.pool_bytes or 0),
        ),
        evidence=evidence(found, start.pool),
    )


def _out_of_memory(log: Log, start: Start) -> Diagnosis | None:
    """A refusal by the GPU: at which stage, its traceback says."""
    refused, bare = torch_cuda.refusal(log), log.first(_OUT)
    if refused is None and bare is None:
        return None
    dead, place = log.first(_DEAD), place_of(log)
    doing = f" while {place.doing}" if place else ""
    ended = " The engine is dead, and every request after it gets an error." if dead else ""
    culprit: Culprit = place.culprit if place else "activation"
    phase: Phase = place.phase if place else ("serve" if dead else "profile")
    said = torch_cuda.describe(refused) if refused else "The GPU ran out of memory"
    return torch_cuda.with_refusal(
        _base(
            start,
            f"{said}{doing}.{ended}",
            phase=phase,
            culprit=culprit,
            cold_start_spike=_serving(place, dead),
            causes=_serving_causes(place, dead),
            changes=changes_at(phase, culprit, start, refused),
            evidence=evidence(bare, place.found if place else None, dead, log.first(_ANSWERS)),
        ),
        refused,
    )


def _serving(place: Place | None, dead: Found | None) -> bool | None:
    return None if place is None else place.phase in ("prefill", "serve") and dead is not None


def _serving_causes(place: Place | None, dead: Found | None) -> tuple[str, ...]:
    if place is None or not _serving(place, dead):
        return ()
    if "prompt_logprobs" in place.doing:
        return (
            "prompt_logprobs keeps the logits of every prompt token of a step; the profiling pass "
            "at the start does not count them.",
        )
    return (
        "Cold-start spike: a request needed more than the profiling pass at the start had "
        "measured.",
    )


def _dead(log: Log, start: Start) -> Diagnosis | None:
    found = log.first(_DEAD, _NOT_STARTED)
    if found is None:
        return None
    died = log.first(_DEAD) is not None
    what = "engine died after it had started" if died else "engine did not start"
    return _base(
        start,
        f"vLLM's {what}. The log has no out-of-memory error.",
        phase="serve" if died else None,
        causes=("A process that the kernel kills writes nothing: look into dmesg.",),
        changes=(Change("dmesg | ullage doctor -", "tells whether the kernel killed it"),),
        evidence=evidence(found, log.first(_ANSWERS)),
    )


def _healthy(log: Log, start: Start) -> Diagnosis | None:
    if start.pool_bytes is None and start.pool_tokens is None:
        return None
    tokens = f" of {start.pool_tokens:,} tokens" if start.pool_tokens else ""
    times = start.concurrency
    holds = (
        f": {times.number('times'):,.2f} requests of {times.count('context'):,} tokens at once"
        if times else ""
    )  # fmt: skip
    return replace(
        _base(start, f"vLLM started, with a KV pool{tokens}{holds}."),
        failed=False,
        evidence=evidence(
            start.weights, start.activation, start.graphs, start.pool, times,
            log.first(TOKENS, BLOCKS),
        ),
    )  # fmt: skip


_FAILURES: tuple[Callable[[Log, Start], Diagnosis | None], ...] = (
    _busy, _sampler, _no_pool, _small_pool, _few_tokens, _out_of_memory, _dead,
)  # fmt: skip
