"""Numbers that the host has worked out, for the device."""

import torch


def sent(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`numbers`, from the host's memory, on `device`, which is not awaited."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
