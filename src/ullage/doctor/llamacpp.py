"""llama.cpp: the buffers that it logs, the one that could not be had, and a crash while serving.

The wordings are those of src/llama-model.cpp, src/llama-kv-cache.cpp, src/llama-context.cpp,
ggml/src/ggml-alloc.c and common/fit.cpp, of 2024 to build 11434.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from ullage.doctor.diagnosis import Change, Culprit, Diagnosis, Phase, Run, evidence, measured
from ullage.doctor.llamacpp_changes import (
    fitting_cache,
    less_context,
    smaller_batch,
    smaller_cache,
)
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Part, Term
from ullage.units import MIB, format_bytes

WORDS = (
    "buffer size", "load_tensors", "memory breakdown", " MiB on device", "buffer of size",
    "failed to allocate", "unable to allocate", "layers to GPU", "n_ctx", "n_ubatch", "n_seq_max",
    "n_slots", "CUDA error", "ROCm error", "HIP error", "current device", "OutOfDeviceMemory",
    "llama_", "ggml_", "common_", "Context size has been", "MiB free", "VRAM: ", "graph_reserve",
    "file type",
    "server is listening", "model loaded", "slots are idle", "launch_slot", "general.name",
)  # fmt: skip

SIGNS = (
    r"(?:load_tensors|llama_kv_cache\w*|llama_context|llama_new_context_with_model|sched_reserve"
    r"|llama_init_from_model|llama_memory_recurrent|llama_model_load\w*|graph_reserve"
    r"|llama_params_fit\w*|common_\w+)\s*:",
    r"ggml_\w+:", r"memory breakdown \[MiB\]", r"current device: \d+, in function",
)  # fmt: skip
_DEVICE = r"(?P<device>[A-Za-z_]\w{0,30}(?:\(\))?)"
_BUFFERS: tuple[tuple[Part, str, str], ...] = (
    ("weights", "weights", rf"load_tensors: {_DEVICE} (?:model )?buffer size = {{size}}"),
    ("kv", "KV cache", rf"{_DEVICE} KV buffer size = {{size}}"),
    ("kv", "recurrent state", rf"{_DEVICE} RS buffer size = {{size}}"),
    ("activation", "compute buffer", rf"{_DEVICE} compute buffer size = {{size}}"),
    ("logits", "output buffer", rf"{_DEVICE} output buffer size = {{size}}"),
)
UNACCOUNTED = "unaccounted"  # what a device holds beside the buffers: context, kernels, others
_ROW = (  # of the table that llama.cpp prints when it fits or ends, in MiB
    r"\| - (?P<device>[^|]{1,80}?) \| {total#} = {free#} \+ \( {own#} = {model#} \+ "
    r"{context#} \+ {compute#} \)(?: \+ {unaccounted#} \|)?"
)
_NOT_HAD = (
    r"allocating {wanted} on device \d+: cudaMalloc failed",
    r"failed to allocate (?P<device>\S{1,30}) buffer of size {bytes#}",
    r"failed to allocate buffer of size {bytes#}",
    r"failed to allocate buffer, size = {wanted}",
    r"ErrorOutOfDeviceMemory",
    r"unable to allocate (?P<device>\S{1,30}) buffer",
)
_ROLES: tuple[tuple[str, Culprit], ...] = (
    (r"failed to allocate buffer for (?:kv|rs) cache|llama_kv_cache_init\(\) failed", "kv"),
    (r"alloc_tensor_range: failed|unable to allocate \S+ buffer|unable to load model", "weights"),
    (r"failed to allocate compute|gallocr_reserve\w*: failed|graph_reserve: failed", "activation"),
)
_SERVING = r"(?:CUDA|ROCm|HIP) error: out of memory"
_FULL = r"Context size has been exceeded"
_READY = r"server is listening|model loaded|all slots are idle|slot launch_slot|generate: n_ctx"
_LAYERS = r"offloaded {some#}/{all#} layers to GPU"
_FREE = (r"\({total#} MiB, {free#} MiB free\)", r"using device \S+ .{0,80}? - {free#} MiB free")
_HOST = re.compile(r"CPU|Host|_Host|BLAS|\(\)", re.IGNORECASE)


@dataclass(frozen=True)
class Start:
    """The buffers of a start: on accelerators and in host memory."""

    run: Run
    parts: tuple[Term, ...]
    free_bytes: int | None
    total_bytes: int | None
    layers: Found | None
    devices: int

    def size(self, part: Part) -> int:
        """Bytes of a part on accelerators."""
        return sum(
            term.nbytes for term in self.parts if term.part == part and "host" not in term.what
        )

    @property
    def left_bytes(self) -> int | None:
        """Bytes beside the weights and what the cache has already, or None where the log names
        several devices, or none with its free bytes: compute buffers come after."""
        if self.free_bytes is None or self.devices != 1:
            return None
        return max(0, self.free_bytes - self.size("weights") - self.size("kv"))


def recognise(log: Log) -> Diagnosis | None:
    """What llama.cpp's log shows, or None if it is none."""
    if log.first(*SIGNS) is None:
        return None
    start = read_start(log)
    return _while_serving(log, start) or _not_had(log, start) or _healthy(log, start)


def read_start(log: Log) -> Start:
    """The buffers that the log shows; of a device that is named twice the last counts."""
    free = log.first(*_FREE)
    total = log.first(_FREE[0], r"VRAM: {total#} MiB")
    return Start(
        run=Run(
            model=_model(log),
            quantization=_file_type(log),
            prefill_chunk=log.count(r"n_ubatch = {n#}"),
            kv_dtype=log.word(r"K \((?P<word>\w+)\):"),
            max_model_len=log.count(r"\bn_ctx = {n#}"),
            max_num_seqs=log.count(r"n_seq_max = {n#}", r"n_slots = {n#}"),
        ),
        parts=_table(log) or _buffers(log),
        free_bytes=None if free is None else free.count("free") * MIB,
        total_bytes=None if total is None else total.count("total") * MIB,
        layers=log.last(_LAYERS),
        devices=_devices(log),
    )


def _devices(log: Log) -> int:
    """Accelerators that hold weights, by the log's own buffers."""
    names = {place.text("device") for place in log.every(_BUFFERS[0][2])}
    return sum(_where(name) == "GPU" for name in names)


def _model(log: Log) -> str:
    """The model's name, if all of it is on the device and its file type is known: nothing else
    can be planned."""
    layers = log.last(_LAYERS)
    whole = layers is not None and layers.count("some") == layers.count("all")
    return log.word(r"general\.name (?:str )?= (?P<word>[^|]{1,80})$") if whole else ""


def _file_type(log: Log) -> str:
    """``Q4_K - Medium`` as llama-quantize calls it: q4_k_m."""
    name = log.word(r"file type = (?P<word>I?Q\d\w*(?: - (?:Small|Medium|Large))?|BF16|F16|F32)")
    kind, _, size = name.lower().partition("-")
    return kind.strip() + (f"_{size.strip()[0]}" if size.strip() else "")


def _buffers(log: Log) -> tuple[Term, ...]:
    terms = []
    for part, what, pattern in _BUFFERS:
        by_device = {place.text("device"): place for place in log.every(pattern)}
        for where in ("GPU", "host"):
            found = [place for device, place in by_device.items() if _where(device) == where]
            size = sum(place.size("size") for place in found)
            if size > 0:
                terms.append(measured(part, _label(what, where), size, found[0]))
    return tuple(terms)


def _where(device: str) -> Literal["GPU", "host"]:
    return "host" if _HOST.search(device) else "GPU"


def _label(what: str, where: str) -> str:
    return what if where == "GPU" else f"{what} in host memory"


def _table(log: Log) -> tuple[Term, ...]:
    """The table's figures of all devices, each as it is printed last. Before anything is allocated
    the last column is negative, and says nothing."""
    rows = {row.text("device"): row for row in log.every(_ROW)}
    columns: tuple[tuple[Part, str], ...] = (
        ("weights", "model"), ("kv", "context"), ("activation", "compute"),
        ("overhead", UNACCOUNTED),
    )  # fmt: skip
    return tuple(
        measured(part, f"{column} on {device}", row.count(column) * MIB, row)
        for device, row in rows.items()
        for part, column in columns
        if row.text(column) and row.count(column)
    )


def _base(start: Start, happened: str, **more: object) -> Diagnosis:
    diagnosis = Diagnosis(
        happened, True, "llama.cpp", parts=start.parts, run=start.run,
        free_bytes=start.free_bytes, total_bytes=start.total_bytes,
    )  # fmt: skip
    return replace(diagnosis, **more)  # type: ignore[arg-type]


def _not_had(log: Log, start: Start) -> Diagnosis | None:
    """A buffer that could not be had, unless the start went on without it."""
    found, ready = log.last(*_NOT_HAD), log.last(_READY)
    if found is None or (ready is not None and ready.line.number > found.line.number):
        return None
    wanted, role = _wanted(found), _role(log)
    culprit = role[0] if role else "weights"
    phase: Phase = "load" if culprit == "weights" else "profile"
    name = {"weights": "the weights", "kv": "the KV cache"}.get(culprit, "the compute buffer")
    size = f"{format_bytes(wanted)} for " if wanted else "memory for "
    return _base(
        start,
        f"llama.cpp could not allocate {size}{name}.",
        phase=phase,
        culprit=culprit,
        wanted_bytes=wanted,
        changes=_changes(culprit, start, wanted),
        evidence=evidence(found, role[1] if role else None, start.layers),
    )


def _wanted(found: Found) -> int | None:
    groups = found.match.re.groupindex
    if "bytes" in groups:
        return found.count("bytes")
    return found.size("wanted") if "wanted" in groups else None


def _role(log: Log) -> tuple[Culprit, Found] | None:
    for pattern, culprit in _ROLES:
        found = log.last(pattern)
        if found is not None:
            return culprit, found
    return None


def _changes(culprit: Culprit, start: Start, wanted: int | None) -> tuple[Change, ...]:
    """The cheapest first: what keeps the quality and the speed."""
    if culprit == "kv":
        return fitting_cache(start.run, wanted, start.left_bytes)
    if culprit == "activation":
        return (
            *smaller_batch(start.run, wanted),
            Change("-fa on", "flash attention builds no score matrix"),
            *less_context(start.run, None),
        )
    return (Change("-fit on", "lets llama.cpp itself choose what goes onto the device"),
            *_fewer_layers(start, wanted),
            Change("-ncmoe 99", "keeps the experts of a mixture in RAM"))  # fmt: skip


def _fewer_layers(start: Start, wanted: int | None) -> tuple[Change, ...]:
    """As many layers as the free bytes hold, where the log tells both."""
    if not (start.layers and wanted and start.free_bytes) or start.free_bytes >= wanted:
        return (Change("-ngl 20", "keeps fewer layers on the device; slower"),)
    every = start.layers.count("all")
    fitting = every * start.free_bytes * 9 // (10 * wanted)
    why = f"of {every} layers so many fit into {format_bytes(start.free_bytes)}, a tenth apart"
    return (Change(f"-ngl {fitting}", why, wanted * (every - fitting) // max(1, every)),)


def _while_serving(log: Log, start: Start) -> Diagnosis | None:
    """Flash attention's scratch grows with the filled context: a start that fits is no proof."""
    found = log.last(_SERVING)
    if found is None:
        full = log.last(_FULL)
        return None if full is None else _context_full(start, full)
    return _base(
        start,
        "The GPU ran out of memory while llama.cpp was evaluating tokens.",
        phase="serve",
        culprit="activation",
        cold_start_spike=True,
        causes=(
            "Scratch outside of the buffers that were allocated at the start grows with the filled "
            "context and with the batch.",
        ),
        changes=(
            *smaller_batch(start.run, None),
            *smaller_cache(start.run, start.size("kv") or None),
            Change("-fitt 2048", "keeps 2 GiB free instead of 1"),
            *less_context(start.run, start.size("kv") or None),
        ),
        evidence=evidence(found),
    )


def _context_full(start: Start, found: Found) -> Diagnosis:
    run = start.run
    return _base(
        start,
        "A request was longer than the context of its slot; no memory was missing.",
        phase="serve",
        culprit="kv",
        changes=(
            Change("-np 1", "one slot gets the whole context"),
            Change(f"-c {2 * (run.max_model_len or 8192)}", "twice the context"),
            *smaller_cache(run, start.size("kv") or None),
        ),
        evidence=evidence(found),
    )


def _healthy(log: Log, start: Start) -> Diagnosis | None:
    if not start.parts:
        return None
    total = sum(term.nbytes for term in start.parts if "host" not in term.what.lower())
    long = (
        f" with a context of {start.run.max_model_len:,} tokens" if start.run.max_model_len else ""
    )
    return replace(
        _base(
            start, f"llama.cpp started{long}; its buffers on devices take {format_bytes(total)}."
        ),
        failed=False,
        evidence=evidence(*(log.last(pattern) for _, _, pattern in _BUFFERS)),
    )
