"""PyTorch's refusals on a GPU, in the wordings of several versions."""

from collections.abc import Callable

import pytest

from ullage.doctor import Diagnosis
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]

# github.com/murong-xu/CADS issue 4, torch 2.6
WITH_PROCESS = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total "
    "capacity of 31.47 GiB of which 12.73 GiB is free. Including non-PyTorch memory, this process "
    "has 18.73 GiB memory in use. Of the allocated memory 9.08 GiB is allocated by PyTorch, and "
    "9.35 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large "
    "try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
# github.com/carolchenyx/MGFN. issue 35, torch 2.1 with its "capacty"
CAPACTY = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.70 GiB. GPU 0 has a "
    "total capacty of 6.00 GiB of which 0 bytes is free. Of the allocated memory 2.93 GiB is "
    "allocated by PyTorch, and 2.30 GiB is reserved by PyTorch but unallocated."
)
# github.com/pytorch/pytorch issue 59778, torch 1.8
OLD = (
    "CUDA out of memory. Tried to allocate 2.26 GiB (GPU 0; 6.00 GiB total capacity; 781.59 MiB "
    "already allocated; 3.03 GiB free; 1.24 GiB reserved in total by PyTorch)"
)
# github.com/pytorch/pytorch issue 16417, torch 1.0
OLDEST = (
    "RuntimeError: CUDA out of memory. Tried to allocate 12.50 MiB (GPU 0; 10.92 GiB total "
    "capacity; 8.57 MiB already allocated; 9.28 GiB free; 4.68 MiB cached)"
)


def test_the_figures_of_the_message_are_kept_in_bytes(diagnosed: Diagnosed) -> None:
    found = diagnosed(WITH_PROCESS)
    assert found.failed
    assert found.engine == "pytorch"
    assert found.wanted_bytes == round(22.78 * GIB)
    assert found.free_bytes == round(12.73 * GIB)
    assert found.total_bytes == round(31.47 * GIB)
    assert {term.label for term in found.parts} == {"measured"}
    held = {term.what: term.nbytes for term in found.parts}
    assert held["reserved, unallocated, at the refusal"] == round(9.35 * GIB)
    assert "other processes, at the refusal" not in held


def test_a_request_that_is_larger_than_what_is_reserved_is_no_fragmentation(
    diagnosed: Diagnosed,
) -> None:
    found = diagnosed(WITH_PROCESS)
    assert found.fragmentation is False
    assert found.cold_start_spike is True
    assert found.culprit == "activation"


def test_fragmentation_is_more_reserved_than_was_asked_for(diagnosed: Diagnosed) -> None:
    found = diagnosed(CAPACTY)
    assert found.fragmentation is True
    assert found.culprit == "fragmentation"
    assert found.changes[0].flags == "PYTORCH_ALLOC_CONF=expandable_segments:True"
    assert found.changes[0].frees_bytes == round(2.30 * GIB)


def test_a_card_that_is_full_is_not_called_fragmented(diagnosed: Diagnosed) -> None:
    found = diagnosed(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a "
        "total capacity of 23.65 GiB of which 8.00 MiB is free. Including non-PyTorch memory, this "
        "process has 23.64 GiB memory in use. Of the allocated memory 22.19 GiB is allocated by "
        "PyTorch, and 420.00 MiB is reserved by PyTorch but unallocated."
    )
    assert found.fragmentation is False
    assert found.culprit == "activation"
    assert not any("Fragmentation" in cause for cause in found.causes)


def test_the_older_message_counts_reserved_in_total(diagnosed: Diagnosed) -> None:
    found = diagnosed(OLD)
    spare = round(1.24 * GIB) - round(781.59 * MIB)
    assert found.parts[1].nbytes == spare
    assert found.fragmentation is False


def test_the_oldest_message_is_read_too(diagnosed: Diagnosed) -> None:
    assert diagnosed(OLDEST).wanted_bytes == round(12.5 * MIB)


def test_memory_of_other_processes_is_named(diagnosed: Diagnosed) -> None:
    # the wording of torch 2.6 with a second process on the card
    found = diagnosed(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 23.57 GiB of which 605.88 MiB is free. Process 133288 has 12.97 GiB memory in "
        "use. Including non-PyTorch memory, this process has 10.00 GiB memory in use. Of the "
        "allocated memory 9.20 GiB is allocated by PyTorch, and 185.98 MiB is reserved by PyTorch "
        "but unallocated."
    )
    assert found.culprit == "other process"
    assert found.changes[0].flags == "nvidia-smi"


def test_our_own_process_is_found_among_numbers_of_another_namespace(diagnosed: Diagnosed) -> None:
    # github.com/vllm-project/vllm issue 15105, from a container; without the engine's own lines
    found = diagnosed(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.74 GiB. GPU 1 has a total "
        "capacity of 23.57 GiB of which 605.88 MiB is free. Process 133288 has 22.97 GiB memory in "
        "use. Of the allocated memory 20.21 GiB is allocated by PyTorch, with 128.00 MiB allocated "
        "in private pools (e.g., CUDA Graphs), and 185.98 MiB is reserved by PyTorch but "
        "unallocated."
    )
    held = {term.what: term.nbytes for term in found.parts}
    assert held["CUDA graphs, at the refusal"] == 128 * MIB
    assert "other processes, at the refusal" not in held


@pytest.mark.parametrize("width", [40, 61, 80, 120])
def test_a_message_that_a_terminal_has_wrapped_is_read(diagnosed: Diagnosed, width: int) -> None:
    text = WITH_PROCESS.partition(" If reserved")[0]
    lines = [text[at : at + width] for at in range(0, len(text), width)]
    found = diagnosed("\n".join(lines))
    assert found.wanted_bytes == round(22.78 * GIB)
    assert found.free_bytes == (round(12.73 * GIB) if width > 40 else found.free_bytes)


def test_weights_are_blamed_where_the_traceback_loads_them(diagnosed: Diagnosed) -> None:
    found = diagnosed(
        '  File "/x/transformers/modeling_utils.py", line 277, in from_pretrained\n' + WITH_PROCESS
    )
    assert (found.phase, found.culprit) == ("load", "weights")


def test_eager_attention_is_replaced_by_one_without_scores(diagnosed: Diagnosed) -> None:
    frame = '  File "/x/models/llama/modeling_llama.py", line 190, in %s\n'
    found = diagnosed(frame % "generate" + frame % "eager_attention_forward" + WITH_PROCESS)
    assert found.changes[0].flags == 'attn_implementation="sdpa"'
    assert found.changes[0].frees_bytes == found.wanted_bytes
    found = diagnosed(frame % "generate" + frame % "sdpa_attention_forward" + WITH_PROCESS)
    assert not any("sdpa" in change.flags for change in found.changes)


def test_an_error_without_figures_is_still_an_error(diagnosed: Diagnosed) -> None:
    found = diagnosed("RuntimeError: CUDA error: out of memory\n")
    assert (found.failed, found.engine) == (True, "pytorch")
    assert found.wanted_bytes is None
