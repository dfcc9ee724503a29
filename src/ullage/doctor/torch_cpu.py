"""PyTorch's allocator on a CPU: the kernel refused what was asked for.

https://github.com/pytorch/pytorch/blob/main/c10/core/impl/alloc_cpu.cpp
"""

from ullage.doctor.diagnosis import Change, Diagnosis
from ullage.doctor.frames import pytorch_failure, scoreless_attention
from ullage.doctor.log import Log
from ullage.units import format_bytes

WORDS = ("DefaultCPUAllocator", "you tried to allocate")

_REFUSED = (
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory): you tried to allocate "
    r"(?P<wanted>\d{1,15} bytes)"
)


def recognise(log: Log) -> Diagnosis | None:
    """The error of a program that runs PyTorch on a CPU."""
    found = log.first(_REFUSED)
    if found is None:
        return None
    wanted = found.size("wanted")
    return pytorch_failure(
        log,
        found,
        f"The kernel refused {format_bytes(wanted)} of RAM at once",
        "host memory",
        wanted_bytes=wanted,
        causes=("A single tensor of this size: the scores, logits or weights of one step.",),
        changes=(
            *scoreless_attention(log, wanted),
            Change("--prefill-chunk 128", "in `ullage run`: the prompt is read in pieces, so that "
                   "scores and activations stop growing with it"),
            Change("--weights int8", "in `ullage run`: about half of the weights' bytes"),
        ),
    )  # fmt: skip
