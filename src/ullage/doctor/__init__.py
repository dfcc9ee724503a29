"""An engine's log in; what ate the memory, and what to change, out. No torch.

Adding an engine is adding a file with `WORDS`, the words that its lines have, and `recognise`.
"""

from dataclasses import replace
from pathlib import Path

from ullage.doctor import (
    kernel,
    llamacpp,
    ollama,
    sglang,
    tensorrt_llm,
    tgi,
    torch_cpu,
    torch_cuda,
    torch_mps,
    vllm,
)
from ullage.doctor.cards import WORDS as CARD_WORDS
from ullage.doctor.cards import card_of
from ullage.doctor.diagnosis import Diagnosis
from ullage.doctor.fit import with_plan
from ullage.doctor.frames import WORDS as FRAME_WORDS
from ullage.doctor.learn import learn
from ullage.doctor.log import Log, read_log
from ullage.errors import InputError

__all__ = ["Diagnosis", "diagnose", "learn"]

# An engine says more than what runs underneath it, so that engines come first.
_RECOGNISERS = (
    tgi, vllm, sglang, tensorrt_llm, ollama, llamacpp, kernel, torch_cuda, torch_mps, torch_cpu
)  # fmt: skip
_WORDS = (*FRAME_WORDS, *CARD_WORDS, *(word for one in _RECOGNISERS for word in one.WORDS))
_KNOWN = (
    "start-up and crash logs of vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp and Ollama, PyTorch's "
    "out-of-memory errors on NVIDIA, AMD and Apple GPUs and on CPUs, and the kernel's OOM killer "
    "(dmesg, exit code 137, OOMKilled)"
)


def diagnose(path: Path | None) -> Diagnosis:
    """What the log in a file shows; None reads standard input.

    Raises:
        InputError: the log cannot be read, is larger than 200 MB, or is not understood.
    """
    log = read_log(path, _WORDS)
    diagnosis = _recognise(log)
    if diagnosis is None:
        name = "standard input" if path is None else str(path)[:200]
        raise InputError(
            f"{name} shows neither a start nor a memory failure that is understood. "
            f"What can be read: {_KNOWN}."
        )
    return with_plan(replace(diagnosis, device=card_of(log)))


def _recognise(log: Log) -> Diagnosis | None:
    """The first failure; where there is none, the first healthy start."""
    found = [made for one in _RECOGNISERS if (made := one.recognise(log)) is not None]
    failure = next((made for made in found if made.failed), None)
    if failure is None:
        return next(iter(found), None)
    return _with_engine(failure, found)


def _with_engine(failure: Diagnosis, found: list[Diagnosis]) -> Diagnosis:
    """A kill, with the engine whose start the same log shows."""
    started = next((made for made in found if not made.failed), None)
    if failure.engine != "linux" or started is None:
        return failure
    return replace(
        failure,
        engine=started.engine,
        engine_version=started.engine_version,
        phase="serve",
    )
