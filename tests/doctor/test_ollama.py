"""Ollama's estimates and its runner."""

from collections.abc import Callable

from ullage.doctor import Diagnosis
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]

# github.com/ollama/ollama issue 10920
REFUSED = "Error: model requires more system memory (164.8 GiB) than is available (13.4 GiB)\n"
# github.com/ollama/ollama issue 5913
OFFLOAD = """\
Jul 24 21:50:02 vega ollama[132945]: time=2024-07-24T21:50:02.743+02:00 level=INFO \
source=memory.go:309 msg="offload to rocm" layers.requested=-1 layers.model=81 layers.offload=43 \
layers.split="" memory.available="[24.0 GiB]" memory.required.full="43.1 GiB" \
memory.required.partial="23.7 GiB" memory.required.kv="640.0 MiB" \
memory.required.allocations="[23.7 GiB]" memory.weights.total="39.9 GiB" \
memory.weights.repeating="38.9 GiB" memory.weights.nonrepeating="974.6 MiB" \
memory.graph.full="313.0 MiB" memory.graph.partial="1.3 GiB"
"""
# github.com/ollama/ollama issue 12027, 0.11
NEWER = """\
time=2025-08-24T08:26:00.310Z level=INFO source=backend.go:310 msg="model weights" device=CUDA0 size="4.0 GiB"
time=2025-08-24T08:26:00.310Z level=INFO source=backend.go:321 msg="kv cache" device=CUDA0 size="936.0 MiB"
time=2025-08-24T08:26:00.310Z level=INFO source=backend.go:332 msg="compute graph" device=CUDA0 size="98.0 MiB"
time=2025-08-24T08:26:00.310Z level=INFO source=backend.go:342 msg="total memory" size="5.4 GiB"
"""
# github.com/ollama/ollama issue 9782 and llama.cpp's lines underneath
RUNNER = """\
time=2025-03-15T10:00:00Z level=INFO source=server.go:405 msg="starting llama server" \
cmd="/usr/bin/ollama runner --model /x/blobs/sha256-1 --ctx-size 8192 --parallel 4"
load_tensors:        CUDA0 model buffer size = 18508.35 MiB
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 5120.00 MiB on device 0: cudaMalloc failed: out of memory
llama_kv_cache_init: failed to allocate buffer for kv cache
Error: llama runner process has terminated: cudaMalloc failed: out of memory
"""


def test_a_refusal_has_both_figures(diagnosed: Diagnosed) -> None:
    found = diagnosed(REFUSED)
    assert found.failed
    assert found.engine == "ollama"
    assert found.culprit == "host memory"
    assert found.wanted_bytes == round(164.8 * GIB)
    assert found.free_bytes == round(13.4 * GIB)
    assert found.changes[0].flags.startswith("OLLAMA_NUM_PARALLEL=1")


def test_its_estimates_are_not_called_measured(diagnosed: Diagnosed) -> None:
    found = diagnosed(OFFLOAD)
    assert not found.failed
    assert {term.label for term in found.parts} == {"assumed"}
    assert found.free_bytes == 24 * GIB
    assert "43 of 81 layers on the GPU" in found.happened


def test_what_it_has_allocated_is_measured(diagnosed: Diagnosed) -> None:
    found = diagnosed(NEWER)
    assert {term.what: term.nbytes for term in found.parts} == {
        "weights on CUDA0": 4 * GIB,
        "KV cache on CUDA0": 936 * MIB,
        "graph on CUDA0": 98 * MIB,
    }


def test_the_runners_failure_gets_ollamas_settings(diagnosed: Diagnosed) -> None:
    found = diagnosed(RUNNER)
    assert (found.engine, found.culprit) == ("ollama", "kv")
    assert found.wanted_bytes == 5120 * MIB
    assert all("OLLAMA_" in change.flags for change in found.changes)
    assert "OLLAMA_CONTEXT_LENGTH=4096" in found.changes[-1].flags


# github.com/ollama/ollama issue 9782: the server's lines without the runner's own
ENDED = """\
time=2025-03-15T10:00:09Z level=ERROR source=sched.go:456 msg="error loading llama server" \
error="llama runner process has terminated: REASON"
"""


def test_a_runner_that_ended_is_a_failure_by_that_line_alone(diagnosed: Diagnosed) -> None:
    found = diagnosed(OFFLOAD + ENDED.replace("REASON", "cudaMalloc failed: out of memory"))
    assert (found.failed, found.engine, found.phase) == (True, "ollama", "load")
    assert "cudaMalloc failed: out of memory" in found.happened
    assert found.free_bytes == 24 * GIB
    assert "OLLAMA_NUM_PARALLEL=1" in found.changes[0].flags
    assert [line.line for line in found.evidence] == [1, 2]


def test_a_runner_that_ended_for_another_reason_is_no_lack_of_memory(diagnosed: Diagnosed) -> None:
    found = diagnosed(OFFLOAD + ENDED.replace("REASON", "exit status 2"))
    assert found.failed
    assert "no out-of-memory error" in found.happened
    assert not found.changes


def test_a_killed_runner_is_left_to_the_kernels_reader(diagnosed: Diagnosed) -> None:
    found = diagnosed(OFFLOAD + ENDED.replace("REASON", "signal: killed"))
    assert (found.failed, found.engine, found.culprit) == (True, "ollama", "host memory")
