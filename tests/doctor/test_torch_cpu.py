"""PyTorch's allocator on a CPU."""

from collections.abc import Callable

import pytest

from ullage.doctor import Diagnosis

Diagnosed = Callable[[str], Diagnosis]


@pytest.mark.parametrize(
    ("text", "wanted_bytes"),
    [
        # github.com/mxfold/mxfold2 issue 20
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't "
         "allocate memory: you tried to allocate 132426121216 bytes. Error code 12 (Cannot "
         "allocate memory)", 132426121216),
        # github.com/timesler and others, torch 1.7
        ("RuntimeError: [enforce fail at CPUAllocator.cpp:64] . DefaultCPUAllocator: can't "
         "allocate memory: you tried to allocate 6576668672 bytes. Error code 12", 6576668672),
        # github.com/MaximeVandegar/Papers-in-100-Lines-of-Code issue 10, Windows
        ("RuntimeError: [enforce fail at C:\\b\\alloc_cpu.cpp:81] data. DefaultCPUAllocator: not "
         "enough memory: you tried to allocate 1981808640 bytes.", 1981808640),
    ],
)  # fmt: skip
def test_the_bytes_are_those_of_the_message(
    diagnosed: Diagnosed, text: str, wanted_bytes: int
) -> None:
    found = diagnosed(text)
    assert found.failed
    assert found.wanted_bytes == wanted_bytes
    assert found.culprit == "host memory"
    assert found.changes


def test_eager_attention_is_replaced_by_one_without_scores(diagnosed: Diagnosed) -> None:
    found = diagnosed(
        'File "x.py", line 190, in eager_attention_forward\n'
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 25769803776 bytes. Error code 12"
    )
    assert found.changes[0].flags == 'attn_implementation="sdpa"'
