"""Right answers stand place by place."""

import pytest
from rich.console import Console

from ullage.cli.show.evaluated import show_evaluation
from ullage.specs.evaluation import Cell, Comparison, Evaluation, Figure


def test_places_are_rows_of_tasks_and_columns_of_depths(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = (Figure(75, 2, 8), Figure(25, 2, 8), Figure(-50, 3, 8))
    cells = tuple(
        Cell(task, depth, 4, 3, 1) for task in ("needle", "[b]variables") for depth in (0.1, 0.5)
    )
    done = Evaluation(
        "retrieval", "[red]tiny[/]", 9, "cpu", "fp32", "fp32", ("dms",), 2048, 0, 7,
        (Comparison("[b]needle", "accuracy", *figures, 1 << 20, 1 << 19),), cells,
    )  # fmt: skip
    show_evaluation(Console(highlight=False, width=80), done)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "[b]needle live KV 1.0 MiB 512.0 KiB -50.0%" in lines
    assert "accuracy 75.00 ±2.00 25.00 ±2.00 -50.00 ±3.00 8" in lines
    assert "right at depth 10% 50% of" in lines
    assert "needle 3, 1 3, 1 4" in lines
    assert any(line.startswith("[red]tiny[/], fp32 weights") for line in lines)
    assert any("up to 2,048 tokens, seed 7" in line for line in lines)
