"""Dense against compressed, as a picture."""

from pathlib import Path
from typing import Any

from ullage.measure.picture import save
from ullage.specs.evaluation import Cell, Comparison, Evaluation, Metric

_UNITS: dict[Metric, str] = {
    "perplexity": ", %",
    "accuracy": ", points",
    "log-likelihood": ", nats",
}


def draw_evaluation(done: Evaluation, path: Path) -> None:
    """Draw into `path` the change of each metric with its standard error, task by task, or a heat
    map for each task where places in the prompt were asked about; the ending says the format (.svg,
    .png).

    Raises:
        InputError: the file cannot be written, or its ending is no picture's.
    """
    from matplotlib.figure import Figure  # the figure alone: no window system is asked for

    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(f"{done.model}: {', '.join(done.techniques)}, {done.tokens:,} tokens")
    if done.cells:
        _heat_maps(figure, done.cells)
    else:
        _changes(figure, done.comparisons)
    save(figure, path)


def _changes(figure: Any, comparisons: tuple[Comparison, ...]) -> None:
    metrics = list(dict.fromkeys(found.metric for found in comparisons))
    every = figure.subplots(1, len(metrics), squeeze=False)[0]
    for metric, axes in zip(metrics, every, strict=True):
        found = [one for one in comparisons if one.metric == metric]
        axes.errorbar(
            [one.task for one in found],
            [one.change.value for one in found],
            yerr=[one.change.error for one in found],
            fmt="o",
            capsize=4,
        )
        axes.axhline(0, color="tab:gray", linewidth=1)
        axes.tick_params(axis="x", rotation=60)
        axes.set(title=f"{metric}: change{_UNITS.get(metric, '')}")
        axes.grid(alpha=0.3)


def _heat_maps(figure: Any, cells: tuple[Cell, ...]) -> None:
    """A task each: the share of right answers by depth, a column a side."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    every = figure.subplots(1, len(tasks), squeeze=False)[0]
    shown = None
    for task, axes in zip(tasks, every, strict=True):
        shown = _heat_map(axes, [cell for cell in cells if cell.task == task])
        axes.set(title=task, ylabel="depth")
    figure.colorbar(shown, ax=every, label="right answers")


def _heat_map(axes: Any, cells: list[Cell]) -> Any:
    shares = [[cell.dense / cell.n, cell.compressed / cell.n] for cell in cells]
    axes.set_xticks(range(2), ["dense", "compressed"])
    axes.set_yticks(range(len(cells)), [f"{cell.depth:.0%}" for cell in cells])
    for row, several in enumerate(shares):
        for column, share in enumerate(several):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center")
    return axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
