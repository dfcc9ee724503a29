"""The steps of a training, as they are shown, and what is said beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


@dataclass
class StepsShown:
    """A bar, and what of its steps is saved."""

    progress: Progress
    task: TaskID
    steps: int
    done: int = 0
    safe: int = 0

    def resumed(self, steps: int) -> None:
        """Say that so many are done before the first."""
        self.safe = steps
        if steps < self.steps:
            say(f"Going on at step {steps + 1:,} of {self.steps:,}.", self.progress.console)

    def made(self, saved_every: int, **found: float) -> None:
        """One more; what a step found, by the names of the bar's text."""
        self.done += 1
        self.safe = max(self.safe, self.done - self.done % saved_every)
        self.progress.update(self.task, advance=1, **found)  # type: ignore[arg-type]


@contextmanager
def steps_shown(steps: int, text: str, **found: float) -> Iterator[StepsShown]:
    """A bar of so many steps, with `text` of what they find, as a format of names; an interrupt
    says what is saved.
    """
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(text.replace("{", "{task.fields[").replace(":", "]:")),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True) as progress:
        shown = StepsShown(progress, progress.add_task("", total=steps, **found), steps)  # type: ignore[arg-type]
        try:
            yield shown
        except KeyboardInterrupt:
            said = f"{shown.safe:,} of {steps:,} steps are saved: the same command goes on there."
            say(said, progress.console)
            raise


def say(text: str, console: Console | None = None) -> None:
    """On stderr, in one line that can be copied."""
    (console or stderr()).print(escape(text), soft_wrap=True)


def stderr() -> Console:
    """Where all is said that is no data."""
    return Console(stderr=True, highlight=False)
