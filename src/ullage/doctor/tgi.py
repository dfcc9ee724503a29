"""Text Generation Inference: its warm-up measures what is left for tokens, and is where it fails.

The wordings are those of 0.9 to 3.3: server/text_generation_server/models, router/src.
"""

from dataclasses import replace

from ullage.doctor import torch_cuda
from ullage.doctor.diagnosis import Change, Culprit, Diagnosis, Phase, Run, evidence
from ullage.doctor.log import Found, Log

WORDS = (
    "text_generation", "text-generation", "prefill tokens", "max batch total tokens",
    "max_batch_total_tokens", "out of memory", "OutOfMemoryError",
)  # fmt: skip

_PREFILL = r"Not enough memory to handle {tokens#} prefill tokens"
_TOTAL = r"Not enough memory to handle {total#} total tokens with {tokens#} prefill tokens"
_SIGNS = (
    r"text_generation_(?:launcher|router|client|server)", r"text-generation-launcher",
    _PREFILL, _TOTAL,
)  # fmt: skip
_SHORT = (
    r"max_total_tokens`? must be <= `?max_batch_total_tokens`?\. Given: {wanted#} and {tokens#}"
)
_OUT = r"(?:CUDA|HIP) (?:error: )?out of memory|OutOfMemoryError|\(out of memory\)"
_WARMUP = r"Method Warmup encountered an error|warmup(?:\{[^}]*\})?:|Unable to warmup model"
_DECODE = r"Method Decode encountered an error|:decode(?:\{[^}]*\})?:"
_READY = r"Setting max batch total tokens to {tokens#}"
_NAMED = r"{name}: (?:Some\( )?{{n#}}"


def recognise(log: Log) -> Diagnosis | None:
    """What TGI's log shows, or None if it is none."""
    if log.first(*_SIGNS) is None:
        return None
    run = _read_run(log)
    failure = _too_many(log, run) or _too_short(log, run) or _out_of_memory(log, run)
    return failure or _healthy(log, run)


def _read_run(log: Log) -> Run:
    """The launcher's arguments."""
    return Run(
        model=log.word(r'model_id: "(?P<word>[^"]{1,200})"'),
        dtype=log.word(r"\bdtype: Some\((?P<word>\w+)\)").lower(),
        quantization=log.word(r"\bquantize: Some\((?P<word>[\w-]+)\)").lower(),
        max_model_len=log.count(_NAMED.format(name="max_total_tokens")),
        prefill_chunk=log.count(_NAMED.format(name="max_batch_prefill_tokens")),
        utilization=log.share(r"cuda_memory_fraction: (?P<share>[01](?:\.\d{1,6})?)"),
        tensor_parallel=log.count(_NAMED.format(name="num_shard")) or 1,
    )


def _base(run: Run, happened: str, **more: object) -> Diagnosis:
    diagnosis = Diagnosis(happened, True, "text-generation-inference", run=run)
    return replace(diagnosis, **more)  # type: ignore[arg-type]


def _too_many(log: Log, run: Run) -> Diagnosis | None:
    """The warm-up reads the longest prompts that the launcher allows, and had no room for them."""
    found = log.first(_TOTAL, _PREFILL)
    if found is None:
        return None
    tokens, total = found.count("tokens"), "total" in found.match.re.groupindex
    fewer = Change(
        f"--max-batch-prefill-tokens {max(1, tokens // 2)}", "reads fewer prompt tokens at once"
    )
    fewer_kept = (
        (Change(f"--max-batch-total-tokens {found.count('total') // 2}", "a smaller KV pool"),)
        if total
        else ()
    )
    culprit: Culprit = "kv" if total else "activation"
    what = f"{found.count('total'):,} tokens and a prefill" if total else "a prefill"
    diagnosis = _base(
        run,
        f"The warm-up had no room for {what} of {tokens:,} tokens.",
        phase="profile",
        culprit=culprit,
        changes=(*fewer_kept, fewer, *_less_weights(run)),
        evidence=evidence(found),
    )
    return torch_cuda.with_refusal(diagnosis, torch_cuda.refusal(log))


def _less_weights(run: Run) -> tuple[Change, ...]:
    shards = Change(f"--num-shard {2 * run.tensor_parallel}", "shares the weights")
    if run.quantization:
        return (shards,)
    return (Change("--quantize fp8", "halves the weights, on GPUs that have it"), shards)


def _too_short(log: Log, run: Run) -> Diagnosis | None:
    found = log.first(_SHORT)
    if found is None:
        return None
    tokens = found.count("tokens")
    return _base(
        run,
        f"The KV pool holds {tokens:,} tokens, and one request may have {found.count('wanted'):,}.",
        phase="profile",
        culprit="kv",
        changes=(
            Change(f"--max-total-tokens {tokens}", "the longest request that the pool holds"),
            *_less_weights(run),
        ),
        evidence=evidence(found),
    )


def _out_of_memory(log: Log, run: Run) -> Diagnosis | None:
    refused, bare = torch_cuda.refusal(log), log.first(_OUT)
    if refused is None and bare is None:
        return None
    ready, where = log.last(_READY), log.first(_WARMUP)
    phase = _phase(log, ready, where)
    doing = {"profile": "warming up", "load": "loading the weights", "decode": "writing tokens"}
    said = torch_cuda.describe(refused) if refused else "The GPU ran out of memory"
    diagnosis = _base(
        run,
        f"{said} while {doing.get(phase, 'reading a prompt')}.",
        phase=phase,
        culprit="weights" if phase == "load" else "activation",
        cold_start_spike=phase == "prefill",
        changes=_changes_at(phase, run, ready),
        evidence=evidence(bare, ready or where),
    )
    return torch_cuda.with_refusal(diagnosis, refused)


def _phase(log: Log, ready: Found | None, warmup: Found | None) -> Phase:
    """The warm-up's end is what it prints the tokens for."""
    if ready is not None:
        return "decode" if log.first(_DECODE) else "prefill"
    return "load" if warmup is None else "profile"


def _changes_at(phase: Phase, run: Run, ready: Found | None) -> tuple[Change, ...]:
    fewer = Change(
        f"--max-batch-prefill-tokens {max(1, (run.prefill_chunk or 4096) // 2)}",
        "reads fewer prompt tokens at once",
    )
    if ready is None:
        return _less_weights(run) if phase == "load" else (fewer, *_less_weights(run))
    tokens = ready.count("tokens") * 9 // 10
    pool = Change(f"--max-batch-total-tokens {tokens}", "a KV pool smaller by a tenth")
    return (pool, fewer) if phase == "decode" else (fewer, pool)


def _healthy(log: Log, run: Run) -> Diagnosis | None:
    ready = log.last(_READY)
    if ready is None:
        return None
    tokens = ready.count("tokens")
    times = f", {tokens / run.max_model_len:.2f} times the longest" if run.max_model_len else ""
    return replace(
        _base(run, f"TGI started: its requests may have {tokens:,} tokens together{times}."),
        failed=False,
        evidence=evidence(ready),
    )
