"""What a device holds, and the wall around it; CUDA's figures stand in for a GPU."""

import pytest
import torch

from ullage.runtime import memory
from ullage.units import GIB

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """A GPU of 80 GiB: 5 are torch's, 3 its context's. The list fills with the walls built."""
    walls: list[tuple[float, torch.device]] = []
    figures = {
        "mem_get_info": lambda _: (72 * GIB, 80 * GIB),
        "memory_reserved": lambda _: 5 * GIB,
        "max_memory_reserved": lambda _: 9 * GIB,
        "set_per_process_memory_fraction": lambda share, device: walls.append((share, device)),
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, figure)
    return walls


def test_a_peak_counts_what_the_driver_holds_beside_the_allocator(
    gpu: list[tuple[float, torch.device]],
) -> None:
    assert memory.held_bytes(CUDA) == 8 * GIB
    assert memory.peak_bytes(CUDA) == (9 + 3) * GIB


@pytest.mark.parametrize(
    ("budget_bytes", "share"), [(23 * GIB, 0.25), (83 * GIB, 1.0), (200 * GIB, 1.0), (GIB, 0.0)]
)
def test_the_wall_leaves_the_allocator_the_budget_less_what_is_beside_it(
    gpu: list[tuple[float, torch.device]], budget_bytes: int, share: float
) -> None:
    memory.wall(CUDA, budget_bytes)
    assert gpu == [(share, CUDA)]


def test_there_is_no_wall_on_cpu(gpu: list[tuple[float, torch.device]]) -> None:
    memory.wall(torch.device("cpu"), GIB)
    assert gpu == []
