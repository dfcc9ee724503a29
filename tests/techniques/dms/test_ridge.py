"""The closed form finds what was put in."""

import torch

from ullage.techniques.dms.adapter import DECIDED_TOKENS
from ullage.techniques.dms.ridge import Fit


def test_what_is_missed_is_read_off_hidden_states_again() -> None:
    """Whatever all tokens of a span have in common."""
    random = torch.Generator().manual_seed(0)
    rule = torch.randn(2, 3, 8, generator=random) / 2  # [L, Hkv, E]
    fit = Fit(2, 3, 8)
    for _ in range(4):
        hidden = torch.randn(3 * DECIDED_TOKENS + 5, 8, generator=random)
        shift = torch.arange(len(hidden)) // DECIDED_TOKENS * 3.0
        for layer in range(2):
            fit.add(layer, hidden, (rule[layer] @ hidden.T + shift).exp())
    torch.testing.assert_close(fit.weights(), rule, atol=0.05, rtol=0.05)


def test_entries_that_nobody_misses_teach_nothing() -> None:
    fit = Fit(1, 1, 4)
    fit.add(0, torch.randn(DECIDED_TOKENS, 4), torch.zeros(1, DECIDED_TOKENS))
    assert torch.equal(fit.weights(), torch.zeros(1, 1, 4))
