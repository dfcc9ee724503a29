"""An evaluation as data, and what the planner can take of it."""

import json
from dataclasses import replace

import pytest

from ullage.specs.evaluation import EVERY, Comparison, Evaluation, Figure

LINES = (
    Comparison("a", "perplexity", Figure(30, 1, 9), Figure(31, 1, 9), Figure(3.3, 1, 9), 100, 50),
    Comparison(EVERY, "perplexity", Figure(30, 1, 9), Figure(30.6, 1, 9), Figure(2, 1, 9), 100, 50),
    Comparison(EVERY, "mean KLD", Figure(0, 0, 9), Figure(0.1, 1, 9), Figure(0.1, 1, 9), 100, 50),
    Comparison(EVERY, "accuracy", Figure(80, 2, 9), Figure(76, 2, 9), Figure(-4, 0.8, 9), 100, 50),
)
DONE = Evaluation(
    "perplexity", "tiny", 1000, "cpu", "fp32", "fp32", ("dms:kept=0.5,window=16",), 4096, 512, 0,
    LINES,
)  # fmt: skip


def test_the_planner_gets_the_figures_over_all_tasks() -> None:
    rows = {row.metric: row for row in DONE.quality()}
    assert set(rows) == {"perplexity %", "mean KLD", "task score %"}
    for row in rows.values():
        assert (row.technique, row.setting) == ("dms", "kept=0.5,window=16")
        assert (row.model, row.parameters, row.n, row.label) == ("tiny", 1000, 9, "measured")
        assert "--seed 0, a: live KV 50.0% of dense, standard error 1" in row.source
    assert rows["perplexity %"].change == 2
    assert rows["task score %"].change == pytest.approx(5)  # of 80, and counted as a loss


def test_techniques_together_are_no_figure_of_one() -> None:
    assert replace(DONE, techniques=("dms:kept=0.5", "quantization")).quality() == []


def test_json_holds_every_figure_and_rows_as_the_catalog_has_them() -> None:
    data = json.loads(json.dumps(DONE.to_json()))
    lines = [
        Comparison(
            **{
                key: Figure(**value) if isinstance(value, dict) else value
                for key, value in line.items()
            }
        )
        for line in data["comparisons"]
    ]
    assert tuple(lines) == LINES
    assert data["quality"][0]["change"] == 2
    assert (data["techniques"], data["tokens"]) == (["dms:kept=0.5,window=16"], 4096)
