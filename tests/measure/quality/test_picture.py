"""Every kind of suite has its picture."""

from dataclasses import replace
from pathlib import Path

import pytest

from ullage.errors import InputError
from ullage.measure.quality.picture import draw_evaluation
from ullage.specs.evaluation import Cell, Comparison, Evaluation, Figure

FIGURES = (Figure(80.0, 2.0, 9), Figure(76.0, 2.0, 9), Figure(-4.0, 1.0, 9))
CHANGES = Evaluation(
    "glue", "tiny", 1000, "cpu", "fp32", "fp32", ("dms:kept=0.5",), 4096, 0, 0,
    (
        Comparison("mrpc", "accuracy", *FIGURES, 100, 50),
        Comparison("mrpc", "log-likelihood", *FIGURES, 100, 50),
        Comparison("rte", "accuracy", *FIGURES, 100, 50),
    ),
)  # fmt: skip
CELLS = tuple(
    Cell(task, depth, 4, 3, 1) for task in ("needle", "variables") for depth in (0.1, 0.5)
)


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.parametrize("done", [CHANGES, replace(CHANGES, cells=CELLS)], ids=["bars", "maps"])
def test_it_is_drawn_whole(done: Evaluation, ending: str, tmp_path: Path) -> None:
    draw_evaluation(done, tmp_path / f"found.{ending}")
    assert (tmp_path / f"found.{ending}").stat().st_size > 5000


def test_a_heat_map_names_its_tasks_depths_and_sides(tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw_evaluation(replace(CHANGES, cells=CELLS), tmp_path / "found.svg")
    text = (tmp_path / "found.svg").read_text()
    for words in ("needle", "variables", "dense", "compressed", "50%", "75%", "right answers"):
        assert words in text


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot draw"):
        draw_evaluation(CHANGES, tmp_path / "found.doc")
