"""Frequencies of a model's rotation that stay what they are, however long a text gets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHANGING = ("dynamic", "longrope")  # transformers looks at a pass's last position


@contextmanager
def fixed_frequencies(model: "PreTrainedModel") -> Iterator[None]:
    """`model` with those of a short text. Where no distance grows with a text these are right for
    all of it, and keys that were turned by others could not be turned back."""
    changing = [
        (module, module.rope_type, module.inv_freq)
        for module in model.modules()
        if getattr(module, "rope_type", None) in _CHANGING
    ]
    for module, *_ in changing:
        module.rope_type, module.inv_freq = "default", module.original_inv_freq.clone()
    try:
        yield
    finally:
        for module, kind, frequencies in changing:
            module.rope_type, module.inv_freq = kind, frequencies
