"""TensorRT-LLM: weights and buffers first, then a KV pool in a share of what is left.

The wordings are those of 0.7 to 1.2: cpp/tensorrt_llm/batch_manager/kvCacheManager.cpp,
tensorrt_llm/_torch/pyexecutor/py_executor_creator.py.
"""

from dataclasses import dataclass, replace

from ullage.doctor import torch_cuda
from ullage.doctor.diagnosis import Change, Culprit, Diagnosis, Phase, Run, evidence, measured
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Part, Term
from ullage.units import GIB

WORDS = (
    "TensorRT-LLM", "TRT-LLM", "tensorrt_llm", "trtllm", "paged KV cache", "paged kv cache",
    "could not be created", "GPU memory (GiB)", "Executor creation failed", "out of memory",
    "OutOfMemoryError", "before/after creation", "Loaded engine size", "PagedKvCache",
)  # fmt: skip

_SIGNS = (
    r"\[TensorRT-LLM\]", r"\[TRT-LLM\]", r"/tensorrt_llm/", r"trtllm-serve",
    r"Executor creation failed", r"max tokens in paged KV cache",
)  # fmt: skip
_WEIGHTS = r"Loaded engine size: {size}"
_MODEL = r"before/after creation \(GiB\): (?:Model|model): {before%} / {after%}"
_BUFFERS: tuple[tuple[Part, str, str], ...] = (
    ("activation", "execution context", r"Allocated {size} for execution context memory"),
    ("overhead", "runtime buffers", r"Allocated {size} GPU memory for runtime buffers"),
    ("overhead", "decoder", r"Allocated {size} GPU memory for decoder"),
)
_KV = r"Allocated {size} for max tokens in paged KV cache \({tokens#}\)"
_KV_OLD = r"Max tokens in paged KV cache: {tokens#}\. Allocating (?P<size>\d{1,15} bytes)"
_FREE = r"max tokens in paged kv cache: total: {total}, available: {free}"
_UNMADE = r"Executor creation failed.{0,80}insufficient GPU memory"
_COMPONENT = r"component could not be created: (?P<word>\w[\w ]{0,60})"
_TOTAL_GIB, _FREE_GIB = r"Total GPU memory \(GiB\): {n%}", r"creation attempt \(GiB\): {n%}"
_SHORT = r"(?i:maxTokensInPagedKvCache)(?: \({tokens#}\))? must be large enough to process at least"
_OUT = (
    r"CUDA runtime error in .{1,200}: out of memory|(?:CUDA|HIP) out of memory"
    r"|OutOfMemoryError|Cuda Runtime \(out of memory\)"
)
# The component's first words, in what order they are looked for, and what it is made of.
_COMPONENTS: tuple[tuple[str, Culprit, str], ...] = (
    ("initial kv cache", "activation", "the trial run that sizes the KV pool"),
    ("_no_capture", "activation", "the trial run that sizes the KV pool"),
    ("additional executor", "activation", "resources of the executor"),
    ("model resources", "activation", "what the model's first run takes"),
    ("model_extra", "activation", "what the model's first run takes"),
    ("sampler", "logits", "the sampler"),
    ("kv", "kv", "the KV pool"),
    ("draft", "weights", "the draft model"),
    ("model", "weights", "the model"),
)


@dataclass(frozen=True)
class Start:
    """What TensorRT-LLM says of its start."""

    run: Run
    version: str
    parts: tuple[Term, ...]
    kv: Found | None
    before_kv: Found | None


def recognise(log: Log) -> Diagnosis | None:
    """What TensorRT-LLM's log shows, or None if it is none."""
    if log.first(*_SIGNS) is None:
        return None
    start = _read_start(log)
    failure = _unmade(log, start) or _too_short(log, start) or _out_of_memory(log, start)
    return failure or _healthy(start)


def _read_start(log: Log) -> Start:
    run = Run(
        max_model_len=log.count(r"\bmax_seq_len={n#}", r"maxSequenceLen: {n#}"),
        max_num_seqs=log.count(r"\bmax_batch_size={n#}", r"maxBatchSize: {n#}"),
        prefill_chunk=log.count(r"\bmax_num_tokens={n#}", r"maxNumTokens: {n#}"),
        tensor_parallel=log.count(r"--tp_size[= ]{n#}", r"MPI size: {n#}") or 1,
        utilization=log.share(r"free_gpu_mem(?:ory)?_fraction[= ]+(?P<share>[01]\.\d{1,6})"),
    )
    version = log.word(r"TensorRT-LLM version: (?P<word>\d+\.[\w.]+)")
    kv = log.last(_KV, _KV_OLD)
    return Start(run, version, _parts(log, kv), kv, log.last(_FREE))


def _parts(log: Log, kv: Found | None) -> tuple[Term, ...]:
    """Parts of one rank, as each is printed last."""
    terms = []
    engine, model = log.last(_WEIGHTS), log.last(_MODEL)
    if engine:
        terms.append(measured("weights", "engine", engine.size("size"), engine))
    elif model:
        taken = round((model.number("before") - model.number("after")) * GIB)
        terms.append(measured("weights", "model", max(0, taken), model))
    for part, what, pattern in _BUFFERS:
        found = log.last(pattern)
        if found and found.size("size"):
            terms.append(measured(part, what, found.size("size"), found))
    if kv:
        terms.append(measured("kv", "KV pool", kv.size("size"), kv))
    return tuple(terms)


def _base(start: Start, happened: str, **more: object) -> Diagnosis:
    diagnosis = Diagnosis(
        happened, True, "tensorrt-llm", start.version, parts=start.parts, run=start.run
    )
    return replace(diagnosis, **more)  # type: ignore[arg-type]


def _unmade(log: Log, start: Start) -> Diagnosis | None:
    """The PyTorch backend names the component that it had no room for."""
    found, component = log.first(_UNMADE), log.first(_COMPONENT)
    if found is None and component is None:
        return None
    total, free = log.first(_TOTAL_GIB), log.first(_FREE_GIB)
    culprit, what = _component(component)
    diagnosis = _base(
        start,
        f"TensorRT-LLM had no room for {what}.",
        phase="load" if culprit == "weights" else "profile",
        culprit=culprit,
        total_bytes=round(total.number("n") * GIB) if total else None,
        free_bytes=round(free.number("n") * GIB) if free else None,
        changes=_changes(culprit, start),
        evidence=evidence(found, component, free),
    )
    refused = torch_cuda.refusal(log)
    return torch_cuda.with_refusal(diagnosis, refused)


def _component(found: Found | None) -> tuple[Culprit | None, str]:
    name = found.text("word").lower().strip() if found else ""
    for words, culprit, what in _COMPONENTS:
        if name.startswith(words):
            return culprit, what
    return None, "one of its parts"


def _changes(culprit: Culprit | None, start: Start) -> tuple[Change, ...]:
    run = start.run
    share = max(0.1, round((run.utilization or 0.9) - 0.1, 2))
    pool = Change(f"--kv_cache_free_gpu_memory_fraction {share:.2f}",
                  "a smaller KV pool, and more room for everything else")  # fmt: skip
    tokens = Change(f"--max_num_tokens {max(256, (run.prefill_chunk or 8192) // 2)}",
                    "smaller steps have smaller activations")  # fmt: skip
    shards = Change(f"--tp_size {2 * run.tensor_parallel}", "shares the weights and the KV entries")
    sequences = Change(f"--max_batch_size {max(1, (run.max_num_seqs or 256) // 2)}",
                       "the sampler has a row of the vocabulary a sequence")  # fmt: skip
    return {
        "weights": (shards, tokens),
        "kv": (pool, tokens),
        "logits": (sequences, pool),
    }.get(culprit or "", (tokens, pool))


def _too_short(log: Log, start: Start) -> Diagnosis | None:
    found = log.first(_SHORT)
    if found is None:
        return None
    share = round((start.run.utilization or 0.9) + 0.05, 2)
    said = found if found.text("tokens") else start.kv
    tokens = said.count("tokens") if said else 0
    pool = f"of {tokens:,} tokens " if tokens else ""
    larger = (
        (Change(f"--kv_cache_free_gpu_memory_fraction {share:.2f}", "a larger KV pool"),)
        if share <= 0.95
        else ()
    )
    shorter = (
        (Change(f"--max_seq_len {tokens}", "the longest request that the pool holds"),)
        if tokens
        else ()
    )
    return _base(
        start,
        f"The KV pool {pool}does not hold one request of the longest kind.",
        phase="profile",
        culprit="kv",
        changes=(*larger, *shorter),
        evidence=evidence(found, start.before_kv, start.kv),
    )


def _out_of_memory(log: Log, start: Start) -> Diagnosis | None:
    refused, bare = torch_cuda.refusal(log), log.first(_OUT)
    if refused is None and bare is None:
        return None
    phase, culprit, doing = _stage(start, refused.found if refused else bare)
    said = torch_cuda.describe(refused) if refused else "The GPU ran out of memory"
    diagnosis = _base(
        start,
        f"{said} while {doing}.",
        phase=phase,
        culprit=culprit,
        cold_start_spike=phase == "serve",
        changes=_changes(culprit, start),
        evidence=evidence(bare, start.kv, start.before_kv),
    )
    return torch_cuda.with_refusal(diagnosis, refused)


def _stage(start: Start, failed: Found | None) -> tuple[Phase, Culprit, str]:
    """What came before the failure: the old wording stands before the pool is made, the new one
    after it."""
    after = (
        failed is not None and start.kv is not None and failed.line.number > start.kv.line.number
    )
    if after and start.kv is not None and "Allocating" not in start.kv.line.text:
        return "serve", "activation", "running requests"
    if after or start.before_kv is not None:
        return "profile", "kv", "making the KV pool"
    return "load", "weights", "loading the model"


def _healthy(start: Start) -> Diagnosis | None:
    if start.kv is None:
        return None
    tokens, longest = start.kv.count("tokens"), start.run.max_model_len
    times = f", {tokens / longest:.2f} times the longest request" if longest else ""
    return replace(
        _base(start, f"TensorRT-LLM started, with a KV pool of {tokens:,} tokens{times}."),
        failed=False,
        evidence=evidence(start.before_kv, start.kv),
    )
