"""SGLang: a start with its pools, and the two failures that want opposite changes.

The wordings are those of 0.1 to 0.5: sglang/srt/model_executor, mem_cache/memory_pool.py.
"""

from dataclasses import dataclass, replace

from ullage.doctor import torch_cuda
from ullage.doctor.diagnosis import Change, Culprit, Diagnosis, Phase, Run, evidence, measured
from ullage.doctor.frames import place_of
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Term

WORDS = (
    "sglang", "ServerArgs", "server_args", "mem usage", "avail mem", "KV Cache is allocated",
    "Not enough memory", "max_total_num_tokens", "cuda graph", "mem_fraction_static",
    "mem-fraction-static", "cuda-graph-max-bs", "max_total_tokens", "profiled value",
    "Scheduler hit",
)  # fmt: skip

_SIGNS = (
    r"ServerArgs\(", r"sglang/srt/", r"KV Cache is allocated", r"Load weight (?:begin|end)",
    r"--mem-fraction-static", r"max_total_num_tokens=", r"sglang\.launch_server",
)  # fmt: skip
_BEGIN = r"Load weight begin\. .{0,80}?avail mem={size}"
_WEIGHTS = r"Load weight end\. .{0,200}?mem usage={size}"
_AFTER = r"Load weight end\. .{0,200}?avail mem={size}"
_KV = r"KV Cache is allocated\..{0,80}?#tokens: {tokens#}, K size: {keys}, V size: {values}"
_LATENT = r"KV Cache is allocated\..{0,80}?#tokens: {tokens#}, KV size: {size}"
_GRAPHS = r"Capture .{0,40}?graph end\. .{0,400}?mem usage={size}"
_READY = r"max_total_num_tokens={tokens#}, .{0,200}?context_len={context#}"
_LITTLE = r"Not enough memory\. Please try to increase --mem-fraction-static"
_NEGATIVE = r"larger than the profiled value -\d+"
_GRAPH_FAILED = r"Capture cuda graph failed"
_OUT = r"(?:CUDA|HIP) error: out of memory|OutOfMemoryError|(?:CUDA|HIP) out of memory"


@dataclass(frozen=True)
class Start:
    """What SGLang says of its start."""

    run: Run
    version: str
    before: Found | None
    after: Found | None
    weights: Found | None
    kv: Found | None
    graphs: Found | None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool, 0 where the log has none."""
        if self.kv is None:
            return 0
        if "size" in self.kv.match.re.groupindex:
            return self.kv.size("size")
        return self.kv.size("keys") + self.kv.size("values")

    def parts(self) -> tuple[Term, ...]:
        """The parts with their lines."""
        terms: list[Term] = []
        if self.weights:
            terms.append(measured("weights", "weights", self.weights.size("size"), self.weights))
        if self.kv:
            terms.append(measured("kv", "KV pool", self.kv_bytes, self.kv))
        if self.graphs:
            size = self.graphs.size("size")
            terms.append(measured("overhead", "CUDA graphs", size, self.graphs))
        return tuple(terms)


def recognise(log: Log) -> Diagnosis | None:
    """What SGLang's log shows, or None if it is none."""
    if log.first(*_SIGNS) is None:
        return None
    start = _read_start(log)
    failure = _too_little(log, start) or _out_of_memory(log, start) or _stopped(log, start)
    return failure or _healthy(log, start)


def _read_start(log: Log) -> Start:
    run = Run(
        model=log.word(r"model_path='(?P<word>[^']{1,200})'"),
        dtype="",
        kv_dtype=log.word(r"kv_cache_dtype='(?P<word>\w+)'"),
        quantization=log.word(r"\bquantization='(?P<word>[\w-]+)'"),
        max_model_len=log.count(r"context_len={n#}", r"context_length={n#}"),
        max_num_seqs=log.count(r"max_running_requests={n#}"),
        prefill_chunk=log.count(r"chunked_prefill_size={n#}"),
        utilization=log.share(r"mem[_-]fraction[_-]static[= ]+(?P<share>[01]\.\d{1,6})"),
        tensor_parallel=log.count(r"tp_size={n#}") or 1,
        pipeline_parallel=log.count(r"pp_size={n#}") or 1,
    )
    return Start(
        run, log.word(r"(?i:sglang)[ =:]+v?(?P<word>\d+\.\d+[\w.]*)"), log.first(_BEGIN),
        log.first(_AFTER), log.first(_WEIGHTS), log.first(_KV, _LATENT), log.first(_GRAPHS),
    )  # fmt: skip


def _base(start: Start, happened: str, **more: object) -> Diagnosis:
    diagnosis = Diagnosis(
        happened, True, "sglang", start.version, parts=start.parts(), run=start.run
    )
    return replace(diagnosis, **more)  # type: ignore[arg-type]


def _too_little(log: Log, start: Start) -> Diagnosis | None:
    """Nothing is left of the static share after the weights: it must grow."""
    found = log.first(_LITTLE, _NEGATIVE)
    if found is None:
        return None
    return _base(
        start,
        "Nothing is left for KV entries in the static share of the device after the weights.",
        phase="profile",
        culprit="weights",
        causes=("At the start a larger static share helps; while serving a smaller one does.",),
        changes=(
            _larger_share(start),
            Change("--quantization fp8", "halves the weights", _half(start.weights)),
            Change(f"--tp-size {start.run.tensor_parallel * 2}", "shares the weights",
                   _half(start.weights)),
        ),
        evidence=evidence(found, start.before, start.weights),
    )  # fmt: skip


def _half(found: Found | None) -> int | None:
    return None if found is None else found.size("size") // 2


def _larger_share(start: Start) -> Change:
    """SGLang keeps (1 - share) of what was free before the weights for all but weights and KV."""
    if start.before is None or start.after is None:
        return Change("--mem-fraction-static 0.93", "weights and KV entries may take more")
    before, after = start.before.size("size"), start.after.size("size")
    least = 1 - after / max(1, before)
    share = min(0.97, int(least * 100 + 4) / 100)
    why = f"the weights alone take {least:.0%} of what was free; the rest above it is the KV pool"
    return Change(f"--mem-fraction-static {share:.2f}", why)


def _out_of_memory(log: Log, start: Start) -> Diagnosis | None:
    refused, bare = torch_cuda.refusal(log), log.first(_OUT)
    if refused is None and bare is None:
        return None
    graph, place = log.first(_GRAPH_FAILED), place_of(log)
    phase: Phase = "profile" if graph else place.phase if place else "serve"
    culprit: Culprit = "graphs" if graph else place.culprit if place else "activation"
    doing = " while capturing CUDA graphs" if graph else f" while {place.doing}" if place else ""
    said = torch_cuda.describe(refused) if refused else "The GPU ran out of memory"
    diagnosis = _base(
        start,
        f"{said}{doing}.",
        phase=phase,
        culprit=culprit,
        cold_start_spike=phase in ("prefill", "serve"),
        changes=_changes_at(log, phase, start),
        evidence=evidence(bare, graph, place.found if place else None, start.kv),
    )
    return torch_cuda.with_refusal(diagnosis, refused)


def _changes_at(log: Log, phase: Phase, start: Start) -> tuple[Change, ...]:
    if phase == "load":
        return (
            Change("--quantization fp8", "halves the weights", _half(start.weights)),
            Change(f"--tp-size {start.run.tensor_parallel * 2}", "shares the weights",
                   _half(start.weights)),
        )  # fmt: skip
    share = round((start.run.utilization or 0.88) - 0.05, 2)
    smaller = Change(f"--mem-fraction-static {share:.2f}",
                     "a smaller KV pool, and more room for everything else")  # fmt: skip
    if phase == "profile":
        new = log.first(r"--cuda-graph-max-bs-decode")
        flag = "--cuda-graph-max-bs-decode" if new else "--cuda-graph-max-bs"
        return (smaller, Change(f"{flag} 16", "captures fewer and smaller graphs"))
    chunk = max(512, (start.run.prefill_chunk or 8192) // 2)
    return (
        Change(f"--chunked-prefill-size {chunk}", "reads prompts in smaller pieces"),
        smaller,
    )


def _stopped(log: Log, start: Start) -> Diagnosis | None:
    found = log.first(r"Scheduler hit an exception")
    if found is None:
        return None
    return _base(
        start,
        "SGLang's scheduler stopped. The log has no out-of-memory error.",
        evidence=evidence(found),
    )


def _healthy(log: Log, start: Start) -> Diagnosis | None:
    if start.kv is None:
        return None
    ready = log.first(_READY)
    tokens = start.kv.count("tokens")
    times = tokens / max(1, ready.count("context")) if ready else None
    long = f", {times:.2f} times the longest request" if times else ""
    return replace(
        _base(start, f"SGLang started, with a KV pool of {tokens:,} tokens{long}."),
        failed=False,
        evidence=evidence(start.weights, start.kv, start.graphs, ready),
    )
