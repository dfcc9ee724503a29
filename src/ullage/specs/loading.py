"""The order in which weights are read, and how far reading them rises above what stays."""

from collections.abc import Callable

from ullage.specs.model import ModelSpec, TensorSpec


def load_spike_bytes(
    model: ModelSpec,
    resident: Callable[[TensorSpec], int],
    staging: Callable[[TensorSpec], int],
) -> int:
    """How far the load's peak stands above the loaded weights, in bytes.

    Tensors are read largest first, so that the largest staging copy meets an empty room. `resident`
    gives the bytes that a tensor keeps, `staging` those that reading or converting it takes on top.
    """
    loaded_bytes = peak_bytes = 0
    for tensor in sorted(model.tensors, key=lambda tensor: tensor.elements, reverse=True):
        loaded_bytes += tensor.count * resident(tensor)
        peak_bytes = max(peak_bytes, loaded_bytes + staging(tensor))
    return peak_bytes - loaded_bytes
