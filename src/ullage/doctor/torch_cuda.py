"""PyTorch's out-of-memory error on a GPU, in the wordings of 1.x to 2.13.

https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp
"""

from dataclasses import dataclass, replace

from ullage.doctor.diagnosis import Change, Culprit, Diagnosis, evidence, measured
from ullage.doctor.frames import pytorch_failure, scoreless_attention
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Term
from ullage.units import GIB, MIB, format_bytes

WORDS = ("Tried to allocate", "OutOfMemoryError", "out of memory", "total capac")

_TRIED = r"Tried to allocate {wanted}"
_SINCE_2_1 = (
    rf"{_TRIED}\. (?:GPU|XPU device) \d+ has a total capaci?ty of {{total}}"
    r"(?: of which {free} is free)?"
)
_BEFORE_2_1 = (
    rf"{_TRIED} \(GPU \d+; {{total}} total capacity; {{allocated}} already allocated; "
    r"{free} free; {reserved} (?:reserved in total by PyTorch|cached)"
)
_OWN = r"this process has {used} memory in use"
_PROCESS = r"Process \d+ has {used} memory in use"
_ALLOCATED = r"Of the allocated memory {allocated} is allocated by PyTorch"
_GRAPHS = r"with {graphs} allocated in private pools"
_UNALLOCATED = r"and {spare} is reserved by PyTorch but unallocated"
# A full card has some spare bytes too, in the rests of its blocks: below this share of what is
# reserved, joining them would not have helped for long.
_FRAGMENTED_SHARE = 0.05
_BARE = r"(?:CUDA|HIP) error: out of memory|OutOfMemoryError|(?:CUDA|HIP|XPU) out of memory"


@dataclass(frozen=True)
class Refusal:
    """An allocation that the GPU refused, in bytes. `allocated_bytes` is what tensors hold,
    `spare_bytes` what the allocator holds beside that, `other_bytes` what other processes do."""

    found: Found
    wanted_bytes: int
    free_bytes: int
    total_bytes: int
    allocated_bytes: int
    spare_bytes: int
    graph_bytes: int
    other_bytes: int

    @property
    def fragmented(self) -> bool:
        """The allocator held enough, and much beside what tensors held, but in no single piece."""
        reserved_bytes = self.allocated_bytes + self.spare_bytes
        return self.spare_bytes >= max(self.wanted_bytes, reserved_bytes * _FRAGMENTED_SHARE)

    @property
    def missing_bytes(self) -> int:
        """Bytes that the request was larger than what was free."""
        return max(0, self.wanted_bytes - self.free_bytes)

    def parts(self) -> tuple[Term, ...]:
        """The device's bytes at that moment, as the message gives them."""
        driver_bytes = (
            self.total_bytes - self.free_bytes - self.allocated_bytes - self.spare_bytes
        ) - self.other_bytes
        tensors_bytes = self.allocated_bytes - self.graph_bytes
        sizes = (
            ("tensors of all kinds", tensors_bytes),
            ("CUDA graphs", self.graph_bytes),
            ("reserved, unallocated", self.spare_bytes),
            ("outside of PyTorch", driver_bytes),
            ("other processes", self.other_bytes),
        )
        return tuple(
            measured("overhead", f"{what}, at the refusal", size, self.found)
            for what, size in sizes
            if size > 0
        )


def refusal(log: Log) -> Refusal | None:
    """The first refusal that comes with figures."""
    found = log.first(_SINCE_2_1)
    if found is not None:
        return _since_2_1(log, found)
    found = log.first(_BEFORE_2_1)
    return None if found is None else _before_2_1(found)


def _since_2_1(log: Log, found: Found) -> Refusal:
    message = Log([line for line in log.lines if 0 <= line.number - found.line.number <= 3])
    allocated = _size(message.first(_ALLOCATED), "allocated")
    spare = _size(message.first(_UNALLOCATED), "spare")
    total, free = found.size("total"), _size(found, "free")
    own = _size(message.first(_OWN), "used") or _own_process(message, allocated + spare)
    return Refusal(
        found, found.size("wanted"), free, total, allocated, spare,
        _size(message.first(_GRAPHS), "graphs"),
        _others_bytes(total - free - own) if own else 0,
    )  # fmt: skip


def _others_bytes(rest_bytes: int) -> int:
    """Figures are rounded to 0.01 GiB: what is less than a few of those is nothing."""
    return rest_bytes if rest_bytes >= 32 * MIB else 0


def _own_process(message: Log, reserved_bytes: int) -> int:
    """In a container the message names processes by numbers that nobody inside knows: our own is
    the smallest that holds what PyTorch has reserved."""
    used = [place.size("used") for place in message.every(_PROCESS)]
    return min((size for size in used if size >= reserved_bytes), default=0)


def _before_2_1(found: Found) -> Refusal:
    allocated = found.size("allocated")
    return Refusal(
        found, found.size("wanted"), found.size("free"), found.size("total"), allocated,
        max(0, found.size("reserved") - allocated), 0, 0,
    )  # fmt: skip


def _size(found: Found | None, name: str) -> int:
    return 0 if found is None or found.match[name] is None else found.size(name)


def recognise(log: Log) -> Diagnosis | None:
    """The error of a program that runs PyTorch itself."""
    refused, bare = refusal(log), log.first(_BARE)
    if refused is None:
        return None if bare is None else _without_figures(log, bare)
    diagnosis = pytorch_failure(log, refused.found, describe(refused), "activation")
    culprit, causes = blame(refused)
    return replace(
        diagnosis,
        culprit=culprit or diagnosis.culprit,
        parts=refused.parts(),
        wanted_bytes=refused.wanted_bytes,
        free_bytes=refused.free_bytes,
        total_bytes=refused.total_bytes,
        fragmentation=refused.fragmented,
        cold_start_spike=_spike(refused),
        causes=causes,
        changes=_changes(log, refused, loading=diagnosis.phase == "load"),
    )


def describe(refused: Refusal) -> str:
    """The refusal in a sentence, without its full stop."""
    return (
        f"The GPU refused {format_bytes(refused.wanted_bytes)}: "
        f"{format_bytes(refused.free_bytes)} of {format_bytes(refused.total_bytes)} was free"
    )


def blame(refused: Refusal) -> tuple[Culprit | None, tuple[str, ...]]:
    """What explains the refusal whatever the program was doing, and the sentences that say so."""
    if refused.fragmented:
        return "fragmentation", (
            f"Fragmentation: PyTorch held {format_bytes(refused.spare_bytes)} that no tensor "
            f"used, more than the {format_bytes(refused.wanted_bytes)} asked for, but in no "
            f"single piece.",
        )
    if refused.other_bytes >= max(refused.missing_bytes, GIB // 2):
        return "other process", (
            f"Other processes held {format_bytes(refused.other_bytes)} of the device.",
        )
    return None, ()


def remedy(refused: Refusal) -> tuple[Change, ...]:
    """The changes that cost nothing: they are worth trying whatever the engine."""
    changes = []
    if refused.spare_bytes >= refused.missing_bytes > 0:
        changes.append(
            Change(
                "PYTORCH_ALLOC_CONF=expandable_segments:True",
                "lets the allocator join the pieces that it holds "
                "(PYTORCH_CUDA_ALLOC_CONF before torch 2.9)",
                refused.spare_bytes,
            )
        )
    if refused.other_bytes >= max(refused.missing_bytes, GIB // 2):
        changes.append(
            Change("nvidia-smi", "shows the other processes: stop one", refused.other_bytes)
        )
    return tuple(changes)


def with_refusal(diagnosis: Diagnosis, refused: Refusal | None) -> Diagnosis:
    """An engine's diagnosis with the GPU's own figures, and what explains them whatever the
    stage."""
    if refused is None:
        return diagnosis
    lines = {line.line: line for line in (*diagnosis.evidence, *evidence(refused.found))}
    return replace(
        diagnosis,
        parts=(*diagnosis.parts, *refused.parts()),
        wanted_bytes=refused.wanted_bytes,
        free_bytes=refused.free_bytes,
        total_bytes=refused.total_bytes,
        fragmentation=refused.fragmented,
        causes=(*diagnosis.causes, *blame(refused)[1]),
        changes=(*remedy(refused), *diagnosis.changes),
        evidence=tuple(lines[number] for number in sorted(lines)),
    )


def _spike(refused: Refusal) -> bool:
    """One tensor that is large beside all others: scores or logits of a whole prompt."""
    return refused.wanted_bytes * 4 >= refused.allocated_bytes


def _changes(log: Log, refused: Refusal, loading: bool) -> tuple[Change, ...]:
    if loading:
        return (
            *remedy(refused),
            Change("--weights int8", "in `ullage run`: about half of the weights' bytes"),
            Change("--weights nf4", "in `ullage run`: about a quarter of the weights' bytes"),
        )
    spike_bytes = refused.wanted_bytes if _spike(refused) else None
    return (
        *remedy(refused),
        *scoreless_attention(log, refused.wanted_bytes),
        Change("--prefill-chunk 512", "in `ullage run`: the prompt is read in pieces, so that "
               "activations stop growing with it", spike_bytes),
        Change(f"--memory {refused.total_bytes * 95 // 100 >> 20}MiB", "in `ullage run`: a budget "
               "that nothing exceeds, and a request that is too large is refused at the door"),
    )  # fmt: skip


def _without_figures(log: Log, bare: Found) -> Diagnosis:
    return pytorch_failure(
        log,
        bare,
        "The GPU ran out of memory",
        None,
        causes=("The log has no figures.",),
        changes=(Change("nvidia-smi", "shows what holds the device, ours and others"),),
    )
