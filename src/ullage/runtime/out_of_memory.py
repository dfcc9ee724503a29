"""What torch raises when there is no memory, as an error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from ullage.errors import BudgetExceeded

_SIGNS = ("out of memory", "can't allocate memory")  # of CUDA and MPS; of the CPU's allocator


@contextmanager
def explained() -> Iterator[None]:
    """A context in which a failed allocation is a `BudgetExceeded`.

    Raises:
        BudgetExceeded: the device had no memory left, though the budget had.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        raise BudgetExceeded(
            "The device had no memory left inside the budget: other processes hold some, or it "
            "takes more than planned. Give a smaller --memory, or measure it by `ullage audit`."
        ) from error
