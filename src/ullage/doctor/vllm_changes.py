"""What to change in vLLM's flags, the cheapest first, from the log's own figures."""

from ullage.doctor.diagnosis import Change, Culprit, Phase
from ullage.doctor.torch_cuda import Refusal
from ullage.doctor.vllm_facts import Start
from ullage.units import format_bytes

_MOST_SHARE = 0.95  # beyond it there is no room for what vLLM does not measure
_USUAL_SHARE = 0.9  # what vLLM takes where nobody says otherwise
_CLEARLY = 0.03  # below the usual share: less is not worth a start


def changes_at(
    phase: Phase, culprit: Culprit, start: Start, refused: Refusal | None
) -> tuple[Change, ...]:
    """What to change after a refusal at `phase`, by the part that was growing."""
    if phase == "load":
        return _smaller_weights(start)
    if culprit == "graphs":
        return (
            *lower_share(start, refused),
            Change("--max-cudagraph-capture-size 64", "captures fewer and smaller graphs"),
            Change("--enforce-eager", "captures none; decoding gets slower",
                   start.size(start.graphs) or None),
        )  # fmt: skip
    if phase == "profile":
        return (*_smaller_steps(start, refused), *_smaller_weights(start))
    if culprit == "logits":
        refuse = Change("--max-logprobs 0", "refuses requests that ask for logprobs")
        return (*_smaller_steps(start, refused), *lower_share(start, refused), refuse)
    return (*lower_share(start, refused), *_smaller_steps(start, refused))


def _smaller_steps(start: Start, refused: Refusal | None) -> tuple[Change, ...]:
    """Fewer tokens a step: what activations and logits of a prompt are proportional to."""
    tokens = start.run.prefill_chunk
    if tokens is None:
        return (Change("--max-num-batched-tokens 2048", "reads prompts in smaller pieces"),)
    fit = tokens // 2
    if refused is not None and refused.missing_bytes:
        fit = min(fit, tokens * refused.free_bytes // refused.wanted_bytes)
    fit = max(64, 1 << max(0, fit.bit_length() - 1))
    freed = None if refused is None else refused.wanted_bytes * (tokens - fit) // tokens
    if fit >= tokens:
        return ()
    why = f"a step of {tokens:,} tokens needed too much; this many scale to what was free"
    return (Change(f"--max-num-batched-tokens {fit}", why, freed),)


def lower_share(start: Start, refused: Refusal | None) -> tuple[Change, ...]:
    """A smaller KV pool leaves more for what vLLM does not measure."""
    share, total = start.run.utilization, start.total_bytes
    if refused is not None:
        total = refused.total_bytes
    if share is None or refused is None or not total:
        why = "a smaller KV pool, and more room for everything else"
        return (Change("--gpu-memory-utilization 0.85", why),)
    less = -(-refused.missing_bytes * 100 // total) + 1
    lower = round(share - less / 100, 2)
    if lower <= 0.05:
        return ()
    why = f"leaves {less} % of the device more; the KV pool shrinks by as much"
    return (Change(f"--gpu-memory-utilization {lower:.2f}", why, total * less // 100),)


def raise_share(start: Start, missing_bytes: int) -> tuple[Change, ...]:
    """A larger share of the device, where that alone gives the `missing_bytes`."""
    share, total = start.run.utilization, start.total_bytes
    if share is None or not total:
        return ()
    needed = share + (-(-missing_bytes * 100 // total) + 1) / 100
    if needed > _MOST_SHARE or missing_bytes <= 0:
        return ()
    freed = round((needed - share) * total)
    why = "enough for what is missing, if nothing else runs on the device"
    return (Change(f"--gpu-memory-utilization {needed:.2f}", why, freed),)


def usual_share(start: Start, missing_bytes: int) -> tuple[Change, ...]:
    """The usual share of the device where the log states a clearly smaller one; without that, or
    where it gives less than the `missing_bytes`, as `raise_share`."""
    share, total = start.run.utilization, start.total_bytes
    if share is None or share > _USUAL_SHARE - _CLEARLY:
        return raise_share(start, missing_bytes)
    freed = round((_USUAL_SHARE - share) * total) if total else None
    if freed is not None and freed <= missing_bytes:
        return raise_share(start, missing_bytes)
    why = f"the log's {share:.2f} leaves the rest of the device unused, if nothing else runs on it"
    return (Change(f"--gpu-memory-utilization {_USUAL_SHARE}", why, freed),)


def shorter(tokens: int) -> tuple[Change, ...]:
    """Requests of `tokens` at most; none where not even one token fits."""
    if tokens < 1:
        return ()
    return (Change(f"--max-model-len {tokens}", "the longest request that the pool holds"),)


def smaller_entries(start: Start, wanted: int | None, free: int) -> tuple[Change, ...]:
    """KV entries of 8 bits, unless they are so already; `wanted` are the bytes of them
    all, `free` those of the pool."""
    if start.run.kv_dtype.startswith("fp8"):
        return ()
    enough = wanted is None or wanted // 2 <= free
    why = "halves the KV entries" if enough else "halves the KV entries, which is not enough alone"
    return (Change("--kv-cache-dtype fp8", why, wanted // 2 if wanted else None),)


def _smaller_weights(start: Start) -> tuple[Change, ...]:
    weights = start.size(start.weights) or None
    more = start.run.tensor_parallel * 2
    split = Change(f"--tensor-parallel-size {more}", "shares the weights between more devices",
                   weights and weights // 2)  # fmt: skip
    if start.run.quantization:
        return (split,)
    halves = Change("--quantization fp8", "halves the weights", weights and weights // 2)
    return (halves, split)


def smaller_start(start: Start) -> tuple[Change, ...]:
    """What makes the profiling pass and the weights smaller."""
    seqs = start.run.max_num_seqs
    fewer = "128" if seqs is None or seqs > 128 else str(max(1, seqs // 2))
    why = "the profiling pass samples for so many sequences at once"
    return (
        Change(f"--max-num-seqs {fewer}", why),
        *_smaller_steps(start, None),
        *_smaller_weights(start),
    )


def fewer_rows(rows: int, refused: Refusal | None) -> Change:
    """A power of two of sequences for which the sampler's tensor that failed would have fitted."""
    if refused is None or not refused.missing_bytes or not rows:
        fitting = max(1, rows // 4)
        return Change(f"--max-num-seqs {fitting}", "a quarter of the sampler's rows")
    most = max(1, rows * refused.free_bytes // refused.wanted_bytes)
    fitting = 1 << (most.bit_length() - 1)
    why = (
        f"the tensor that failed takes {format_bytes(refused.wanted_bytes // rows)} a sequence, so "
        f"that at most {most:,} fit into the {format_bytes(refused.free_bytes)} that were free"
    )
    freed = refused.wanted_bytes * (rows - fitting) // rows
    return Change(f"--max-num-seqs {fitting}", why, freed)
