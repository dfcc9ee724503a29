"""PyTorch on an Apple GPU: what would pass its own limit, or what Metal has no piece for.

https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/mps/MPSAllocator.mm
"""

from ullage.doctor.diagnosis import Change, Diagnosis, measured
from ullage.doctor.frames import pytorch_failure, scoreless_attention
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Term
from ullage.units import format_bytes

WORDS = ("MPS backend out of memory", "Invalid buffer size")

_REFUSED = (
    r"MPS backend out of memory \(MPS allocated: {allocated}, other allocations: {other}"
    r"(?:, max allowed: {allowed})?\)\. Tried to allocate {wanted}"
)
_TOO_LARGE = r"Invalid buffer size: {wanted}"
_CHANGES = (
    Change("--prefill-chunk 512", "in `ullage run`: the prompt is read in pieces, so that "
           "activations stop growing with it"),
    Change("--weights int8", "in `ullage run`: about half of the weights' bytes"),
)  # fmt: skip
_NO_LIMIT = Change(
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0",
    "lifts PyTorch's limit, and with it what keeps the whole machine from running out",
)


def recognise(log: Log) -> Diagnosis | None:
    """The error of a program that runs PyTorch on an Apple GPU."""
    found = log.first(_REFUSED)
    if found is not None:
        return _refused(log, found)
    found = log.first(_TOO_LARGE)
    return None if found is None else _too_large(log, found)


def _refused(log: Log, found: Found) -> Diagnosis:
    allowed = found.size("allowed") if found.text("allowed") else None
    taken, wanted = found.size("allocated") + found.size("other"), found.size("wanted")
    free = None if allowed is None else max(0, allowed - taken)
    in_pieces = free is not None and free >= wanted
    limit = "" if allowed is None else f" of the {format_bytes(allowed)} that PyTorch may take"
    shared = "RAM is shared with everything else on the machine: PyTorch stops before it is gone."
    cause = "There was as much, but in no single piece." if in_pieces else shared
    return pytorch_failure(
        log,
        found,
        f"The Apple GPU refused {format_bytes(wanted)}: {format_bytes(taken)}{limit} was taken",
        "activation",
        wanted_bytes=wanted,
        parts=_parts(found),
        free_bytes=free,
        total_bytes=allowed,
        fragmentation=in_pieces,
        causes=() if free is None else (cause,),
        changes=(
            *scoreless_attention(log, wanted),
            *_CHANGES,
            *(() if allowed is None else (_NO_LIMIT,)),
        ),
    )


def _parts(found: Found) -> tuple[Term, ...]:
    """PyTorch's own pools, and what Metal holds beside them for its kernels and graphs."""
    sizes = (("pools of PyTorch", "allocated"), ("Metal's own buffers", "other"))
    return tuple(
        measured("overhead", f"{what}, at the refusal", found.size(name), found)
        for what, name in sizes
        if found.size(name)
    )


def _too_large(log: Log, found: Found) -> Diagnosis:
    wanted = found.size("wanted")
    return pytorch_failure(
        log,
        found,
        f"Metal has no buffer as large as {format_bytes(wanted)}, however much is free",
        "activation",
        wanted_bytes=wanted,
        causes=("A single tensor of this size: the scores or logits of a whole prompt.",),
        changes=(*scoreless_attention(log, wanted), *_CHANGES[:1]),
    )
