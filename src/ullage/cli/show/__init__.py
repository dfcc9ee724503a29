"""What `ullage plan` prints: one file a kind of answer. No commands here."""

from rich.console import Console

_WIDE_COLUMNS = 110  # from here on a table has room for what can also be said elsewhere


def answers() -> Console:
    """Where answers go: on a terminal lines end between words, elsewhere they stay whole."""
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def is_wide(console: Console) -> bool:
    """Whether tables need not be narrow."""
    return console.width >= _WIDE_COLUMNS
