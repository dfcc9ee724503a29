"""How an adapter shares entries out, as a table."""

from contextlib import suppress

from rich.console import Console
from rich.table import Table

from ullage.errors import TechniqueError
from ullage.techniques.dms.adapter import Adapter
from ullage.techniques.dms.sharing import shared_out


def show_shares(adapter: Adapter, context: int) -> None:
    """What the heads would hold of a text as long as the model reads, for some savings."""
    table = Table("entries", "windows: least", "half at most", "most", "survive", box=None)
    for share in (2, 4, 8):
        with suppress(TechniqueError):  # below the least window
            shared = [
                one for layer in shared_out(adapter, context / share, context) for one in layer
            ]
            windows = sorted(one.window for one in shared)
            sizes = (windows[0], windows[len(windows) // 2], windows[-1])
            kept = [one.kept for one in shared if one.window < context]
            survive = sum(kept) / max(1, len(kept))
            table.add_row(f"1 in {share}", *(f"{size:,}" for size in sizes), f"{survive:.1%}")
    Console(highlight=False).print(table)
