"""What a choice costs, in numbers and in words."""

from dataclasses import replace

import pytest

from ullage.planner.costs import FREE, Cost
from ullage.specs.quality import Quality

BITS = Quality("weights", "x", "m", 10, "perplexity %", 1.5, 8, "measured", "a run of ours")


@pytest.mark.parametrize(
    ("cost", "percent", "says"),
    [
        (FREE, 0.0, "no loss"),
        (Cost(), None, "no figure"),
        (Cost(BITS), 1.5, "perplexity +1.5% on m, measured"),
        (Cost(replace(BITS, change=-2.0)), 0.0, "perplexity -2% on m, measured"),
        (Cost(replace(BITS, metric="mean KLD")), None, "mean KLD +1.5 on m, measured"),
        (
            Cost(BITS, tail=replace(BITS, metric="99% KLD")),
            1.5,
            "perplexity +1.5% on m, measured; 99% KLD +1.5 on m, measured",
        ),
    ],
)
def test_a_cost_is_a_figure_none_or_nothing(cost: Cost, percent: float | None, says: str) -> None:
    assert cost.percent == percent
    assert str(cost) == says
