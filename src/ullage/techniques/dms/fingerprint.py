"""What tells texts from others."""

import hashlib
from collections.abc import Iterable

import torch


def texts_fingerprint(texts: Iterable[torch.Tensor]) -> str:
    """Hex SHA-256 over `texts`, [T] token ids each, and where each ends."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(f"{ids.tolist()}".encode())
    return digest.hexdigest()
