"""What this process holds on the device that it runs on."""

import torch

from ullage.runtime.process import reset_high_water, status_bytes


def held_bytes(device: torch.device) -> int:
    """Bytes held now: resident memory on CPU, what the driver says is taken on an accelerator."""
    if device.type == "cpu":
        return status_bytes().rss_bytes
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def peak_bytes(device: torch.device) -> int:
    """The most that was held: the kernel's high-water mark on CPU; on CUDA the allocator's, and
    what the driver holds beside it (context, kernels)."""
    if device.type == "cpu":
        return status_bytes().high_water_bytes
    if device.type == "mps":
        return held_bytes(device)
    beside = held_bytes(device) - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_reserved(device) + beside


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` start again from what is held now, where the system allows it."""
    if device.type == "cpu":
        reset_high_water()
    elif device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def wall(device: torch.device, budget_bytes: int) -> None:
    """Let torch's allocator refuse what would pass `budget_bytes`: on CUDA, where it can. What is
    held beside it (context, kernels, other processes) is taken off."""
    if device.type != "cuda":
        return
    _, total_bytes = torch.cuda.mem_get_info(device)
    beside_bytes = held_bytes(device) - torch.cuda.memory_reserved(device)
    share = (budget_bytes - beside_bytes) / total_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
