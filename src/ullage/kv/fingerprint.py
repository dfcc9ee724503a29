"""What tells one model from another, however its weights are stored."""

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fingerprint(model: "PreTrainedModel") -> str:
    """Hex SHA-256 over the norms' weights, which quantization leaves alone, as bf16. A fine-tune
    that leaves the norms alone is taken for the model itself."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 1 and name.endswith("weight"):
            numbers = weight.detach().to("cpu", torch.bfloat16).view(torch.uint8)
            digest.update(name.encode() + bytes(numbers.tolist()))
    return digest.hexdigest()
