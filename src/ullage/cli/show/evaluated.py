"""An evaluation for people."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage.specs.evaluation import Cell, Comparison, Evaluation, Figure, Metric
from ullage.units import format_bytes

_DIGITS: dict[Metric, int] = {"bits per byte": 4, "mean KLD": 4, "99% KLD": 3, "log-likelihood": 3}


def show_evaluation(console: Console, done: Evaluation) -> None:
    """Print the figures, a line a task and metric; then, where there are, place by place."""
    console.print(_comparisons(done))
    if done.cells:
        console.print(_cells(done))
        console.print("Right answers: dense, then compressed.")
    console.print(escape(_footnote(done)), soft_wrap=True)


def _comparisons(done: Evaluation) -> Table:
    table = Table("task", "metric", box=None, pad_edge=False)
    for column in ("dense", "compressed", "change", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ""
    for found in done.comparisons:
        if found.task != shown:
            held = (format_bytes(size) for size in (found.dense_bytes, found.compressed_bytes))
            table.add_row(escape(found.task), "live KV", *held, f"{found.kept - 1:+.1%}")
            shown = found.task
        figures = (_figure(figure, found.metric) for figure in (found.dense, found.compressed))
        table.add_row("", found.metric, *figures, _change(found), f"{found.change.n:,}")
    return table


def _figure(figure: Figure, metric: Metric) -> str:
    digits = _DIGITS.get(metric, 2)
    return f"{figure.value:.{digits}f} ±{figure.error:.{digits}f}"


def _change(found: Comparison) -> str:
    digits, change = _DIGITS.get(found.metric, 2), found.change
    percent = "%" if found.metric == "perplexity" else ""
    return f"{change.value:+.{digits}f}{percent} ±{change.error:.{digits}f}"


def _cells(done: Evaluation) -> Table:
    """Right answers by depth: dense, then compressed."""
    tasks: dict[str, list[Cell]] = {}
    for cell in done.cells:
        tasks.setdefault(cell.task, []).append(cell)
    table = Table("right at depth", box=None, pad_edge=False)
    for name in (*(f"{cell.depth:.0%}" for cell in next(iter(tasks.values()))), "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, cells in tasks.items():
        right = (f"{cell.dense}, {cell.compressed}" for cell in cells)
        table.add_row(task, *right, f"{cells[0].n}")
    return table


def _footnote(done: Evaluation) -> str:
    scored = (
        f"scored beyond {done.beyond_tokens:,} of {done.tokens:,} tokens"
        if done.beyond_tokens
        else f"up to {done.tokens:,} tokens"
    )
    return (
        f"{done.model}, {done.dtype} weights, {done.kv_dtype} KV, {done.device}: "
        f"{', '.join(done.techniques)}; {scored}, seed {done.seed}.\n"
        "± is the standard error; changes are paired, those of accuracy in points."
    )
