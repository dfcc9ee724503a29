"""Logs as they are: other programs between the lines, two engines at once, NUL bytes, long lines."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.doctor import Diagnosis, diagnose
from ullage.errors import InputError, UllageError
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]

VLLM_HEALTHY = """\
INFO 04-22 15:12:01 [core.py:58] Initializing a V1 LLM engine (v0.19.0) with config: model='a/b'
INFO 04-22 15:12:40 [gpu_model_runner.py:9] Model loading took 12.56 GiB memory and 9 seconds
INFO 04-22 15:13:20 [gpu_worker.py:298] Available KV cache memory: 61.65 GiB
INFO 04-22 15:13:20 [kv_cache_utils.py:1314] GPU KV cache size: 188,640 tokens
"""
VLLM_POOL = (
    "ValueError: To serve at least one request with the models's max seq len (262144), (24.0 GiB "
    "KV cache is needed, which is larger than the available KV cache memory (3.18 GiB).\n"
)
TORCH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
    "capacity of 23.56 GiB of which 1.00 GiB is free. Including non-PyTorch memory, this process "
    "has 22.56 GiB memory in use. Of the allocated memory 22.00 GiB is allocated by PyTorch, and "
    "20.00 MiB is reserved by PyTorch but unallocated.\n"
)
SGLANG = """\
[2025-01-01 10:00:00 TP0] Load weight begin. avail mem=78.00 GB
[2025-01-01 10:00:09 TP0] Load weight end. type=LlamaForCausalLM, avail mem=62.00 GB, mem usage=16.00 GB.
[2025-01-01 10:00:10 TP0] KV Cache is allocated. #tokens: 400000, K size: 24.00 GB, V size: 24.00 GB
"""
SGLANG_LITTLE = "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static\n"
LLAMA = """\
load_tensors: offloaded 33/33 layers to GPU
load_tensors:        CUDA0 model buffer size =  4000.00 MiB
llama_context: n_ctx = 8192
llama_kv_cache:      CUDA0 KV buffer size =  1024.00 MiB
main: server is listening on http://127.0.0.1:8080
"""
LLAMA_FAILED = """\
llama_context: n_ctx = 8192
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory
llama_kv_cache_init() failed for self-attention: failed to allocate buffer for kv cache
"""
OLLAMA = (
    'time=2025 level=WARN source=server.go:1 msg="model request too large for system"\n'
    "Error: model requires more system memory (9.0 GiB) than is available (4.0 GiB)\n"
)
KERNEL = (
    "Out of memory: Killed process 77 (python3) total-vm:9000kB, anon-rss:4096kB, file-rss:0kB, "
    "shmem-rss:0kB\n"
)
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.\n"


@dataclass(frozen=True)
class Case:
    """A log, and what it shows whatever stands between its lines."""

    text: str
    engine: str
    failed: bool
    wanted_bytes: int | None = None


CASES = {
    "vllm": Case(VLLM_HEALTHY, "vllm", False),
    "vllm's pool": Case(VLLM_POOL, "vllm", True, 24 * GIB),
    "torch": Case(TORCH, "pytorch", True, 2 * GIB),
    "sglang": Case(SGLANG, "sglang", False),
    "sglang's share": Case(SGLANG + SGLANG_LITTLE, "sglang", True),
    "llama.cpp": Case(LLAMA, "llama.cpp", False),
    "llama.cpp's cache": Case(LLAMA_FAILED, "llama.cpp", True, 4096 * MIB),
    "ollama": Case(OLLAMA, "ollama", True, 9 * GIB),
    "kernel": Case(KERNEL, "linux", True, 4096 * 1024),
    "torch on a cpu": Case(CPU, "pytorch", True, 4096),
}
# Nothing that any engine writes.
JUNK = (
    "", "GET /health 200", "\x1b[32mok\x1b[0m", "tqdm:  37%|###   | 3/8 [00:01<00:02]", "é🦙",
    "{'memory': '12 GiB', 'free': 3}", "Traceback (most recent call last):", "a" * 20_000,
    "100 GiB of 3 TiB", "\x00\x01\x02", "-" * 79, "\ufffd\ufeff", "= = =", "(pid=1) (pid=2)",
)  # fmt: skip


def same(found: Diagnosis, case: Case) -> None:
    assert (found.engine, found.failed, found.wanted_bytes) == (
        case.engine, case.failed, case.wanted_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_alone(diagnosed: Diagnosed, name: str) -> None:
    same(diagnosed(CASES[name].text), CASES[name])


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(CASES)), data=st.data())
def test_junk_between_the_lines_changes_nothing(
    diagnosed: Diagnosed, name: str, data: st.DataObject
) -> None:
    junk = st.lists(st.sampled_from(JUNK), max_size=4)
    lines = []
    for line in CASES[name].text.splitlines():
        lines += [*data.draw(junk), line]
    same(diagnosed("\n".join([*lines, *data.draw(junk)])), CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("end", ["\r\n", "\x1b[0m\n", "\x00\n", "  \t\n"])
def test_ends_of_lines(diagnosed: Diagnosed, name: str, end: str) -> None:
    same(diagnosed(CASES[name].text.replace("\n", end)), CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-8-sig"])
def test_encodings_of_other_shells(tmp_path: Path, name: str, encoding: str) -> None:
    """Half of the bytes of UTF-16 are NUL."""
    log = tmp_path / "engine.log"
    log.write_bytes(CASES[name].text.encode(encoding))
    same(diagnose(log), CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_same_twice_is_the_same(diagnosed: Diagnosed, name: str) -> None:
    """A container that is started again writes into the same log."""
    once, twice = diagnosed(CASES[name].text), diagnosed(CASES[name].text * 2)
    assert (twice.happened, twice.culprit, twice.changes) == (
        once.happened, once.culprit, once.changes,
    )  # fmt: skip
    assert [term.nbytes for term in twice.parts] == [term.nbytes for term in once.parts]


@pytest.mark.parametrize("healthy", [name for name in CASES if not CASES[name].failed])
@pytest.mark.parametrize("failed", [name for name in CASES if CASES[name].failed])
def test_of_two_engines_the_one_that_failed_is_shown(
    diagnosed: Diagnosed, healthy: str, failed: str
) -> None:
    """In either order, as two containers in one log may have it."""
    one, other = CASES[healthy], CASES[failed]
    if one.engine == other.engine == "llama.cpp":
        return  # which tries again with less: a start after it is one that went well
    both = [diagnosed(one.text + other.text), diagnosed(other.text + one.text)]
    assert all(found.failed for found in both)
    # an error of PyTorch is the engine's that runs on it, as is a kill
    whose = one.engine if other.engine in ("linux", "pytorch") else other.engine
    assert {found.engine for found in both} <= {whose, other.engine}
    if other.wanted_bytes is not None:
        assert {found.wanted_bytes for found in both} == {other.wanted_bytes}


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    for name, case in CASES.items():
        log.write_bytes(b"x" * 10_000_000 + b"\n" + case.text.encode())
        begun = time.process_time()
        same(diagnose(log), case)
        assert time.process_time() - begun < 5, name


@pytest.mark.parametrize("name", CASES)
def test_a_message_behind_the_end_of_what_is_read_of_a_line(tmp_path: Path, name: str) -> None:
    """It is not seen, so that nothing is claimed of it."""
    log = tmp_path / "engine.log"
    log.write_text("x" * 100_000 + CASES[name].text.replace("\n", " "), encoding="utf-8")
    with pytest.raises(InputError, match="neither a start nor a memory failure"):
        diagnose(log)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(CASES)), cut=st.integers(0, 700), other=st.integers(0, 700))
def test_a_log_that_was_cut_off(diagnosed: Diagnosed, name: str, cut: int, other: int) -> None:
    """At its start and end: an error of ours, or no byte that was not in it."""
    text = CASES[name].text[min(cut, other) : max(cut, other)]
    try:
        found = diagnosed(text)
    except UllageError:
        return
    assert found.evidence
    assert all(line.text.split()[0] in text for line in found.evidence if line.text)
    assert not found.failed or found.wanted_bytes is None or found.wanted_bytes > 0


def test_lines_are_counted_as_an_editor_counts_them(diagnosed: Diagnosed) -> None:
    found = diagnosed("\n" * 41 + KERNEL)
    assert [(line.line, line.text) for line in found.evidence] == [(42, KERNEL.strip())]
    assert {term.source for term in found.parts} == {"line 42 of the log"}


def test_a_kill_beside_an_engine_that_had_failed_is_the_engines(diagnosed: Diagnosed) -> None:
    found = diagnosed(VLLM_HEALTHY + KERNEL)
    assert (found.engine, found.engine_version, found.phase) == ("vllm", "0.19.0", "serve")
    found = diagnosed(VLLM_POOL + KERNEL)
    assert (found.engine, found.culprit) == ("vllm", "kv")


def test_a_diagnosis_is_data(diagnosed: Diagnosed) -> None:
    found = diagnosed(TORCH)
    assert replace(found, planned="") == found
    assert found.to_json()["parts"][0]["label"] == "measured"
    # 23.56 - 1 free - 22 allocated - 20 MiB spare
    outside = next(term for term in found.parts if term.what.startswith("outside"))
    assert outside.nbytes == pytest.approx(0.56 * GIB - 20 * MIB, abs=0.02 * GIB)
