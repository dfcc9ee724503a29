"""LongRoPE has two sets of frequencies, for short sequences and for long ones. transformers takes
those of the tokens that it has seen, so that the early chunks of a long prompt would be turned by
the short ones; here a run has one set, as its plan's full length asks, as vLLM does.

Dynamic frequencies are the default ones within the trained context; beyond it a text goes with a
bank alone, which fixes them (`kv/frequencies.py`)."""

from typing import Any

import torch
from transformers import PreTrainedModel


def settle_rope(model: PreTrainedModel, context_tokens: int) -> int | None:
    """Fix the frequencies of `model` for sequences of up to `context_tokens`.

    Returns:
        The most tokens that a sequence may have with them, None for any number.
    """
    limits = [_settle(module, context_tokens) for module in model.modules() if _is_long(module)]
    return min((limit for limit in limits if limit is not None), default=None)


def _is_long(module: torch.nn.Module) -> bool:
    return getattr(module, "rope_type", None) == "longrope"


def _settle(module: Any, context_tokens: int) -> int | None:
    short_tokens = int(module.config.rope_parameters["original_max_position_embeddings"])
    if context_tokens <= short_tokens:
        return short_tokens
    # one position past the short sequences makes the module choose the long set
    module(module.inv_freq, torch.tensor([[short_tokens]], device=module.inv_freq.device))
    module.original_inv_freq = module.inv_freq.clone()
    return None
