"""Ollama: its own estimates, and llama.cpp's buffers underneath.

The wordings are those of 0.1 to 0.12: llm/memory.go, llm/server.go, ml/device.go.
"""

from dataclasses import replace

from ullage.doctor import llamacpp
from ullage.doctor.diagnosis import Change, Diagnosis, Run, evidence, measured
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Part, Term
from ullage.units import format_bytes

WORDS = ("ollama", "requires more system memory", "memory.required", "source=", "llama runner")

_SIGNS = (
    r"level=\w+ source=\S+ msg=", r"model requires more system memory", r"\bollama\b",
    r"llama runner process",
)  # fmt: skip
_VERSION = r"\(version (?P<word>\d[\w.+-]*)\)"
_REFUSED = r"model requires more system memory \({wanted}\) than is available \({free}\)"
_OFFLOAD = r"memory\.required\.full=\"{full}\" memory\.required\.partial=\"{partial}\""
_AVAILABLE = r"memory\.available=\"?\[{free}"
_LAYERS = r"layers\.model={all#} layers\.offload={some#}"
_ESTIMATED: tuple[tuple[Part, str, str], ...] = (
    ("kv", "KV cache, estimated", r"memory\.required\.kv=\"{size}"),
    ("weights", "weights, estimated", r"memory\.weights\.total=\"{size}"),
    ("activation", "graph, estimated", r"memory\.graph\.full=\"{size}"),
)
_BUFFERS: tuple[tuple[Part, str, str], ...] = (
    ("weights", "weights", r"msg=\"model weights\" (?:device|buffer)=(?P<device>\S{1,30}) "
     r"size=\"{size}"),
    ("kv", "KV cache", r"msg=\"kv cache\" device=(?P<device>\S{1,30}) size=\"{size}"),
    ("activation", "graph", r"msg=\"compute graph\" (?:device=|backend=\S+ buffer_type=)"
     r"(?P<device>\S{1,30}) size=\"{size}"),
)  # fmt: skip
_TOTAL = r"msg=\"total memory\" size=\"{size}"
_ENDED = r"llama runner process (?:has )?terminated(?:: (?P<reason>[^\"]{1,120}))?"
_OUT = "out of memory"
_KILLED = "signal: killed"


def recognise(log: Log) -> Diagnosis | None:
    """What Ollama's log shows, or None if it is none."""
    if log.first(*_SIGNS) is None:
        return None
    return _refused(log) or _runner_failed(log) or _runner_ended(log) or _loaded(log)


def _base(log: Log, happened: str, **more: object) -> Diagnosis:
    run = Run(
        max_model_len=log.count(r"--ctx-size {n#}", r"KvSize:{n#}"),
        max_num_seqs=log.count(r"--parallel {n#}", r"Parallel:{n#}"),
    )
    diagnosis = Diagnosis(happened, True, "ollama", log.word(_VERSION), parts=_parts(log), run=run)
    return replace(diagnosis, **more)  # type: ignore[arg-type]


def _parts(log: Log) -> tuple[Term, ...]:
    """What Ollama has allocated; its estimates where it says no more."""
    terms = []
    for part, what, pattern in _BUFFERS:
        by_device = {place.text("device"): place for place in log.every(pattern)}
        for device, place in by_device.items():
            if place.size("size"):
                terms.append(measured(part, f"{what} on {device}", place.size("size"), place))
    if terms:
        return tuple(terms)
    estimated = [(part, what, log.last(pattern)) for part, what, pattern in _ESTIMATED]
    return tuple(
        Term(part, what, place.size("size"), "assumed", f"line {place.line.number} of the log")
        for part, what, place in estimated
        if place is not None
    )


def _refused(log: Log) -> Diagnosis | None:
    found = log.last(_REFUSED)
    if found is None:
        return None
    wanted, free = found.size("wanted"), found.size("free")
    return _base(
        log,
        f"Ollama refused to load the model: it counts {format_bytes(wanted)} of RAM, and "
        f"{format_bytes(free)} is available.",
        phase="load",
        culprit="host memory",
        wanted_bytes=wanted,
        free_bytes=free,
        causes=("Free swap counts as available: nothing has been killed.",),
        changes=(*_settings(log, None), _smaller_model(wanted - free)),
        evidence=evidence(found),
    )


def _settings(log: Log, cache_bytes: int | None) -> tuple[Change, ...]:
    """What costs least: fewer parallel requests, then smaller KV entries, then less context."""
    context = log.count(r"--ctx-size {n#}", r"KvSize:{n#}") or 8192
    freed = cache_bytes * 15 // 32 if cache_bytes else None
    return (
        Change("OLLAMA_NUM_PARALLEL=1 OLLAMA_MAX_LOADED_MODELS=1", "one request, one model at a "
               "time: each parallel request holds a context of its own"),
        Change("OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=q8_0", "8.5 bits a KV number "
               "instead of 16", freed),
        Change(f"OLLAMA_CONTEXT_LENGTH={max(2048, context // 2)}", "half of the context",
               cache_bytes // 2 if cache_bytes else None),
    )  # fmt: skip


def _smaller_model(missing_bytes: int) -> Change:
    why = f"weights that are at least {format_bytes(max(0, missing_bytes))} smaller"
    return Change("ollama run MODEL:TAG", f"a tag with {why}")


def _runner_failed(log: Log) -> Diagnosis | None:
    """The runner's own error is llama.cpp's; what to change is Ollama's."""
    inner = llamacpp.recognise(log)
    ended = log.last(_ENDED)
    if inner is None or not inner.failed:
        return None
    cache_bytes = sum(term.nbytes for term in inner.parts if term.part == "kv") or None
    return _base(
        log,
        inner.happened.replace("llama.cpp", "Ollama's runner"),
        phase=inner.phase,
        culprit=inner.culprit,
        parts=inner.parts or _parts(log),
        wanted_bytes=inner.wanted_bytes,
        free_bytes=inner.free_bytes,
        total_bytes=inner.total_bytes,
        cold_start_spike=inner.cold_start_spike,
        causes=inner.causes,
        changes=_settings(log, cache_bytes),
        evidence=(*inner.evidence, *evidence(ended)),
    )


def _runner_ended(log: Log) -> Diagnosis | None:
    """A runner that ended without llama.cpp's own lines. Whose memory a kill was for, the kernel's
    lines tell."""
    ended = log.last(_ENDED)
    if ended is None or _KILLED in ended.text("reason"):
        return None
    reason = ended.text("reason").strip()
    if _OUT not in reason:
        said = f": {reason}" if reason else ""
        happened = f"Ollama's runner ended{said}. The log has no out-of-memory error."
        return _base(log, happened, evidence=evidence(ended))
    free = log.last(_AVAILABLE)
    cache_bytes = sum(term.nbytes for term in _parts(log) if term.part == "kv") or None
    return _base(
        log,
        f"Ollama's runner ran out of GPU memory while it loaded the model: {reason}.",
        phase="load",
        free_bytes=free.size("free") if free else None,
        causes=("Ollama's estimate was smaller than what the runner asked for.",),
        changes=_settings(log, cache_bytes),
        evidence=evidence(log.last(_OFFLOAD), ended),
    )


def _loaded(log: Log) -> Diagnosis | None:
    total, offload = log.last(_TOTAL), log.last(_OFFLOAD)
    if total is None and offload is None:
        return None
    layers, free = log.last(_LAYERS), log.last(_AVAILABLE)
    size = total.size("size") if total else _required(offload)
    return replace(
        _base(log, f"Ollama loaded the model in {format_bytes(size)}{_share(layers)}."),
        failed=False,
        free_bytes=free.size("free") if free else None,
        evidence=evidence(total, offload, layers),
    )


def _required(offload: Found | None) -> int:
    return 0 if offload is None else offload.size("partial")


def _share(layers: Found | None) -> str:
    if layers is None or layers.count("some") >= layers.count("all"):
        return ""
    return (
        f", with {layers.count('some')} of {layers.count('all')} layers on the GPU: the others "
        f"run on the CPU, slower"
    )
