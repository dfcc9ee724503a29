"""Memory against quality and latency, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.planner.candidates import Candidate
from ullage.planner.explore import Exploration
from ullage.units import GIB

_ENDINGS = (".svg", ".png")


def draw_exploration(explored: Exploration, path: Path) -> None:
    """Draw all combinations into `path`, the sweet spot as a star and the cliff as the budget's
    edge; the file's ending says the format (.svg, .png).

    Raises:
        InputError: matplotlib is not installed, the file cannot be written, or its ending is no
            picture's.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise InputError(f"--plot draws {' or '.join(_ENDINGS)}: {str(path)!r} ends in neither.")
    try:
        from matplotlib.figure import Figure  # the figure alone: no window system is asked for
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install 'ullage[run]'.") from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    quality, latency = figure.subplots(1, 2)
    _panel(quality, explored, "loss of quality, %, added up", lambda found: found.cost_percent)
    _panel(latency, explored, "tokens a second, all sequences", _tokens_per_s)
    latency.legend()
    asked = explored.every[0].recipe
    work = asked.workload
    figure.suptitle(
        f"{asked.model.name} on {asked.device.name}, {work.sequences} x {work.context_tokens:,}"
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot draw into {path}: {error}") from error


def _tokens_per_s(found: Candidate) -> float | None:
    return None if found.latency is None else found.latency.tokens_per_s


def _panel(axes: Any, explored: Exploration, label: str, value: Any) -> None:
    fits = [found for found in explored.every if found.fits]
    others = [found for found in explored.every if not found.fits]
    _dots(axes, others, value, marker=".", color="tab:gray", alpha=0.4, label="does not fit")
    _dots(axes, fits, value, marker=".", color="tab:green", alpha=0.6, label="fits")
    _dots(axes, explored.front, value, marker="o", color="tab:blue", alpha=0.9, label="front")
    _dots(
        axes, explored.ranked[:1], value, marker="*", s=220, color="tab:orange", label="sweet spot"
    )
    budget_gib = explored.every[0].budget_bytes / GIB
    axes.axvline(budget_gib, color="tab:red", linewidth=1, label="cliff: the budget")
    axes.set(xlabel="peak, GiB", ylabel=label, ylim=(0, None))
    axes.grid(alpha=0.3)


def _dots(axes: Any, rows: Sequence[Candidate], value: Any, **style: Any) -> None:
    known = [(found.peak_bytes / GIB, value(found)) for found in rows if value(found) is not None]
    if known:
        axes.scatter(*zip(*known, strict=True), **style)
