"""The kernel's OOM killer: dmesg, exit code 137, Kubernetes and Docker.

https://github.com/torvalds/linux/blob/master/mm/oom_kill.c
"""

from dataclasses import dataclass

from ullage.doctor import llamacpp
from ullage.doctor.diagnosis import Change, Diagnosis, evidence, measured
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Term
from ullage.units import MIB, format_bytes

WORDS = (
    "Kill process", "Killed", "oom-kill", "OOMKilled", "anon-rss", "kB, limit", "Memory cgroup",
    "killed as a result", "signal: killed", "SIGKILL", "exitcode: -9", "exit code", "exited with",
    "Exit Code", "ExitCode", "exitCode", "exit status", "cpu_offload_gb",
)  # fmt: skip

_KILLED = r"Killed process \d+ \((?P<name>[^)]{1,64})\)"
_TOTAL = r"total-vm: ?{total}"
_ANONYMOUS = r"anon-rss: ?{anon}"
_FILES = r"file-rss: ?{files}"
_SHARED = r"shmem-rss: ?{shared}"
_CGROUP = r"Memory cgroup out of memory|constraint=CONSTRAINT_MEMCG|Task in \S+ killed as a result"
_LIMIT = r"memory: usage (?P<usage>\d{1,15} kB), limit {limit}"
_POD = r"OOM ?Killed\b(?!\"?: ?false)"
_EXIT = (
    r"(?i:exit(?:ed)?[ _-]?(?:code|status)?)(?: with)?(?: code)?(?: is)?\"?[:= (]+137\b"
    r"|non-zero exit status 137|SIGKILL|exitcode: -9\b|signal: killed"
)
_SHELL = r"^(?:.{0,200}: line \d+: \d+ )?Killed\b(?! process)"
_VLLM_OFFLOADS = r"cpu_offload_gb'?[:=] (?:0?\.0*)?[1-9]"
_LLAMA_CPP = (*llamacpp.SIGNS, r"Killed process \d+ \(llama-")
_ROUND_MIB = 512


@dataclass(frozen=True)
class Kill:
    """A process that was killed. `anonymous_bytes` is what nothing but swap can take away."""

    found: Found
    name: str
    anonymous_bytes: int
    file_bytes: int
    shared_bytes: int

    @property
    def resident_bytes(self) -> int:
        """What it held in RAM."""
        return self.anonymous_bytes + self.file_bytes + self.shared_bytes

    def parts(self) -> tuple[Term, ...]:
        """Its pages by kind."""
        sizes = (
            ("anonymous pages", self.anonymous_bytes),
            ("mapped files", self.file_bytes),
            ("shared memory", self.shared_bytes),
        )
        return tuple(
            measured("overhead", what, size, self.found) for what, size in sizes if size > 0
        )


def recognise(log: Log) -> Diagnosis | None:
    """A kill, with the kernel's own figures or with the exit code alone."""
    kill = _largest_kill(log)
    if kill is not None:
        return _by_kernel(log, kill)
    found = log.first(_POD)
    if found is not None:
        return _by_limit(log, found)
    found = log.first(_EXIT, _SHELL)
    return None if found is None else _by_signal(log, found)


def _largest_kill(log: Log) -> Kill | None:
    """Of the processes that died, the one that held most."""
    kills = [_kill(log, found) for found in log.every(_KILLED)]
    return max(kills, key=lambda kill: kill.resident_bytes, default=None)


def _kill(log: Log, found: Found) -> Kill:
    message = Log([line for line in log.lines if 0 <= line.number - found.line.number <= 2])
    sizes = {}
    for pattern, name in ((_ANONYMOUS, "anon"), (_FILES, "files"), (_SHARED, "shared")):
        place = message.first(pattern)
        sizes[name] = 0 if place is None else place.size(name)
    return Kill(found, found.text("name"), sizes["anon"], sizes["files"], sizes["shared"])


def _by_kernel(log: Log, kill: Kill) -> Diagnosis:
    group, limit = log.first(_CGROUP), log.first(_LIMIT)
    limit_bytes = limit.size("limit") if limit else None
    whose = "its container's limit" if group else "all RAM of the machine"
    of = f" of {format_bytes(limit_bytes)}" if limit_bytes else ""
    return Diagnosis(
        happened=f"The kernel killed {kill.name}: {whose}{of} was used up, and it held "
        f"{format_bytes(kill.resident_bytes)}.",
        failed=True,
        engine="linux",
        culprit="host memory",
        parts=kill.parts(),
        wanted_bytes=kill.resident_bytes or None,
        total_bytes=limit_bytes,
        causes=_causes(kill),
        changes=(*_more_room(kill, group is not None), *_less_memory(log)),
        evidence=evidence(kill.found, group, limit),
    )


def _causes(kill: Kill) -> tuple[str, ...]:
    if kill.anonymous_bytes * 10 < kill.resident_bytes * 9:
        return ()
    return ("Nearly all of it was the process's own allocations, which no page cache gives back.",)


def _more_room(kill: Kill, in_group: bool) -> tuple[Change, ...]:
    if not in_group or not kill.resident_bytes:
        return ()
    step = _ROUND_MIB * MIB
    size_mib = -(-kill.resident_bytes * 5 // 4 // step) * _ROUND_MIB
    return (
        Change(
            f"docker run --memory {size_mib}m (Kubernetes: resources.limits.memory: {size_mib}Mi)",
            "a quarter more than it held when it died",
        ),
    )


def _less_memory(log: Log) -> tuple[Change, ...]:
    """Settings that take RAM, of the engines that the log shows."""
    changes = [
        Change(
            "--memory 80%",
            "in `ullage run`: a budget of this machine's RAM that nothing exceeds, instead of a "
            "kill",
        )
    ]
    if log.first(_VLLM_OFFLOADS) is not None:
        changes.append(Change("--cpu-offload-gb 0", "in vLLM: keeps no weights in RAM"))
    if log.first(*_LLAMA_CPP) is not None:
        why = "in llama.cpp: no host prompt cache, which grows to 8 GiB by default"
        changes.append(Change("--cache-ram 0", why))
    return tuple(changes)


def _by_limit(log: Log, found: Found) -> Diagnosis:
    return Diagnosis(
        happened="The container was killed: it used more RAM than its limit allows (OOMKilled).",
        failed=True,
        engine="linux",
        culprit="host memory",
        causes=("It is the container's RAM, not the GPU's memory: loading weights and pinned "
                "buffers need it.",),
        changes=(
            Change("resources.limits.memory (docker run --memory)", "raise it: weights pass "
                   "through RAM while they are loaded"),
            *_less_memory(log),
        ),
        evidence=evidence(found, log.first(_EXIT)),
    )  # fmt: skip


def _by_signal(log: Log, found: Found) -> Diagnosis:
    return Diagnosis(
        happened="The process was ended by SIGKILL (exit code 137).",
        failed=True,
        engine="linux",
        culprit="host memory",
        causes=(
            "The kernel's OOM killer is the usual sender; this log does not prove it, dmesg does.",
        ),
        changes=(
            Change("dmesg | ullage doctor -", "tells whether the kernel killed it, and at what "
                   "size"),
            *_less_memory(log),
        ),
        evidence=evidence(found),
    )  # fmt: skip
