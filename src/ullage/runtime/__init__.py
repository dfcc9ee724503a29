"""A Plan in, tokens out: load weights as planned, hold the budget, run sequences."""

from ullage.runtime import quiet as quiet
