"""The temperatures that a token can be drawn at. No torch, so that they are refused before it."""

from ullage.errors import InputError

_LEAST, _MOST = 0.001, 1000.0  # beyond them, logits over temperature leave fp32


def refuse_temperature(temperature: float) -> None:
    """Refuse what is neither 0 nor a temperature that logits can be divided by.

    Raises:
        InputError: it is below 0, too near to it, too large, or no number.
    """
    if temperature != 0 and not _LEAST <= temperature <= _MOST:  # NaN is not either
        raise InputError(
            f"A temperature is 0, or from {_LEAST:g} to {_MOST:g}; not {temperature:g}."
        )
