"""PyTorch's error on an Apple GPU."""

from collections.abc import Callable

import pytest

from ullage.doctor import Diagnosis
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]
END = (
    " on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
    "allocations (may cause system failure)."
)


@pytest.mark.parametrize(
    ("text", "wanted", "free", "total"),
    [
        # github.com/datalab-to/surya issue 254
        ("RuntimeError: MPS backend out of memory (MPS allocated: 7.23 GB, other allocations: "
         "1.54 GB, max allowed: 9.07 GB). Tried to allocate 896.00 MB" + END,
         896 * MIB, 0.30 * GIB, 9.07 * GIB),
        # github.com/Comfy-Org/ComfyUI issue 8984, as newer versions write units
        ("MPS backend out of memory (MPS allocated: 15.72 GiB, other allocations: 2.41 MiB, max "
         "allowed: 18.13 GiB). Tried to allocate 5.81 GiB" + END,
         5.81 * GIB, 2.408 * GIB, 18.13 * GIB),
        # github.com/pharmapsychotic/clip-interrogator-ext issue 74: more taken than allowed
        ("MPS backend out of memory (MPS allocated: 6.04 GB, other allocations: 1.04 GB, max "
         "allowed: 6.77 GB). Tried to allocate 459.07 MB" + END,
         459.07 * MIB, 0, 6.77 * GIB),
    ],
)  # fmt: skip
def test_the_figures_are_those_of_the_message(
    diagnosed: Diagnosed, text: str, wanted: float, free: float, total: float
) -> None:
    found = diagnosed(text)
    assert found.failed
    assert found.engine == "pytorch"
    assert found.wanted_bytes == round(wanted)
    assert found.free_bytes == pytest.approx(free, abs=MIB)
    assert found.total_bytes == round(total)
    assert found.fragmentation is False
    assert found.changes[-1].flags == "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0"


def test_what_metal_holds_stands_apart(diagnosed: Diagnosed) -> None:
    # github.com/pytorch/pytorch issue 96814
    found = diagnosed(
        "MPS backend out of memory (MPS allocated: 7.43 GB, other allocations: 24.46 GB, max "
        "allowed: 32.00 GB). Tried to allocate 129.21 MB" + END
    )
    assert {term.what: term.nbytes for term in found.parts} == {
        "pools of PyTorch, at the refusal": round(7.43 * GIB),
        "Metal's own buffers, at the refusal": round(24.46 * GIB),
    }


def test_without_a_limit_no_cause_is_claimed(diagnosed: Diagnosed) -> None:
    """MPSAllocator.mm leaves the limit out where it was lifted."""
    found = diagnosed(
        "RuntimeError: MPS backend out of memory (MPS allocated: 30.00 GiB, other allocations: "
        "0 bytes). Tried to allocate 1.00 GiB on shared pool."
    )
    assert (found.total_bytes, found.free_bytes) == (None, None)
    assert found.fragmentation is False
    assert found.causes == ()
    assert not any("WATERMARK" in change.flags for change in found.changes)


def test_a_buffer_larger_than_metal_has(diagnosed: Diagnosed) -> None:
    # github.com/mberr/torch-max-mem issue 14
    found = diagnosed(
        '  File "transformers/models/llama/modeling_llama.py", line 227, in eager_attention_forward\n'
        "RuntimeError: Invalid buffer size: 74.51 GB\n"
    )
    assert found.wanted_bytes == round(74.51 * GIB)
    assert (found.phase, found.culprit) == ("prefill", "activation")
    assert "scoring attention" in found.happened


def test_eager_attention_is_replaced_by_one_without_scores(diagnosed: Diagnosed) -> None:
    found = diagnosed(
        'File "x.py", line 190, in eager_attention_forward\n'
        "RuntimeError: Invalid buffer size: 24.00 GiB"
    )
    assert found.changes[0].flags == 'attn_implementation="sdpa"'
