"""Planned against measured, and a training, as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.measure.audit import Audit
from ullage.units import MIB


def draw_audit(audit: Audit, path: Path) -> None:
    """Draw peaks over tokens into `path`; its ending says the format (.svg, .png).

    Raises:
        InputError: the file cannot be written, or its ending is no picture's.
    """
    from matplotlib.figure import Figure  # the figure alone: no window system is asked for

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    tokens = [point.plan.recipe.workload.context_tokens for point in audit.points]
    colors = {"load": "tab:gray", "prefill": "tab:blue", "decode": "tab:green"}
    for phase, color in colors.items():
        planned = [point.plan.phases[phase].total_bytes / MIB for point in audit.points]  # type: ignore[index]
        measured = [point.measured.phase_peak_bytes[phase] / MIB for point in audit.points]  # type: ignore[index]
        axes.plot(tokens, planned, "--", color=color, label=f"{phase}, planned")
        axes.plot(tokens, measured, "o", color=color, label=f"{phase}, measured")
    plan = audit.points[0].plan
    budget_mib = plan.budget_bytes / MIB
    if budget_mib < 2 * axes.get_ylim()[1]:
        axes.axhline(budget_mib, color="tab:red", linewidth=1, label="budget")
    axes.set(xlabel="tokens", ylabel="peak, MiB", ylim=(0, None), title=plan.recipe.model.name)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def draw_training(
    losses: Sequence[float], loss_label: str, shares: Sequence[float], share_label: str, path: Path
) -> None:
    """Draw into `path` what a training made of its loss, and of a share, step by step.

    Raises:
        InputError: the file cannot be written, or its ending is no picture's.
    """
    from matplotlib.figure import Figure  # the figure alone: no window system is asked for

    figure = Figure(figsize=(8, 5), layout="constrained")
    loss, share = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(losses) + 1)
    loss.plot(steps, losses)
    loss.set(ylabel=loss_label, yscale="log")
    share.plot(steps, [100 * value for value in shares], color="tab:green")
    share.set(xlabel="steps", ylabel=f"{share_label}, %", ylim=(0, 100))
    for axes in (loss, share):
        axes.grid(alpha=0.3)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib's.

    Raises:
        InputError: the file cannot be written, or its ending is no picture's.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot draw into {path}: {error}") from error
