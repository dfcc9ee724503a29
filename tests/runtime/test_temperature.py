"""Temperatures, refused without torch."""

import math

import pytest

from ullage.errors import InputError
from ullage.runtime.temperature import refuse_temperature


@pytest.mark.parametrize("temperature", [0.0, 0.001, 1.0, 1000.0])
def test_what_logits_can_be_divided_by_passes(temperature: float) -> None:
    refuse_temperature(temperature)


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, 1e-40, 1001.0, math.inf, math.nan])
def test_what_logits_cannot_be_divided_by_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match=r"A temperature is 0, or from 0\.001 to 1000; not"):
        refuse_temperature(temperature)
