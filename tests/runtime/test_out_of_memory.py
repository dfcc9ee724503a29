"""A failed allocation says what to do; any other error stays what it is."""

import pytest
import torch

from ullage.errors import BudgetExceeded
from ullage.runtime.out_of_memory import explained


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
def test_an_allocators_refusal_is_explained(error: Exception) -> None:
    with pytest.raises(BudgetExceeded, match="smaller --memory"), explained():
        raise error


def test_the_cpus_allocator_is_known() -> None:
    with pytest.raises(BudgetExceeded), explained():
        torch.empty(1 << 60, dtype=torch.uint8)


def test_another_error_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"), explained():
        torch.zeros(2, 3) @ torch.zeros(2, 3)
