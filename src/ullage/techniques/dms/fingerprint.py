"""What tells one model from another, however its weights are stored, and texts from others."""

import hashlib
from collections.abc import Iterable
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


def texts_fingerprint(texts: Iterable[torch.Tensor]) -> str:
    """Hex SHA-256 over `texts`, [T] token ids each, and where each ends."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(f"{ids.tolist()}".encode())
    return digest.hexdigest()
