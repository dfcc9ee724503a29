"""What each KV head holds: entries shared out among them with the least loss. No torch."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ullage.errors import TechniqueError
from ullage.techniques.dms.adapter import Adapter

KEPT = (0, 1, 2, 4, 8, 16, 32)  # of a span of entries that are decided on together


class Share(NamedTuple):
    """A head's: its window, in tokens, and which share survives of what leaves it."""

    window: int
    kept: float


class _Option(NamedTuple):
    entries: float
    loss: float
    share: Share


@lru_cache(maxsize=256)
def shared_out(
    adapter: Adapter, average: float, context: int, survivors: bool = True
) -> tuple[tuple[Share, ...], ...]:
    """A share for each head, [L][Hkv], so that a sequence of `context` tokens holds `average`
    entries a head at most, with the least loss altogether; windows alone if there are to be no
    `survivors`.

    Raises:
        TechniqueError: `average` is below the least window.
    """
    choices, steps = _choices(adapter, context, survivors)
    chosen = [options[0] for options in choices]
    left = average * len(chosen) - sum(option.entries for option in chosen)
    if left < 0:
        raise TechniqueError(
            f"dms: {average:.0f} entries a head on average are below the adapter's least window, "
            f"{chosen[0].share.window}."
        )
    for head, step in steps:
        option, before = choices[head][step], chosen[head]
        cost = option.entries - before.entries
        if cost > left:  # what is left makes its window longer, and that is all
            window, kept = before.share
            chosen[head] = before._replace(share=Share(window + int(left / (1 - kept)), kept))
            break
        left -= cost
        chosen[head] = option
    heads = adapter.loss.shape[1]
    shares = tuple(option.share for option in chosen)
    return tuple(shares[at : at + heads] for at in range(0, len(shares), heads))


@lru_cache(maxsize=16)
def _choices(
    adapter: Adapter, context: int, survivors: bool
) -> tuple[list[list[_Option]], list[tuple[int, int]]]:
    """The options of each head that are worth it, and the steps from one to the next, a head and an
    index each, the best first."""
    layers, heads, _ = adapter.loss.shape
    choices = [
        _worthwhile(_options(adapter, layer, head, context, survivors))
        for layer in range(layers)
        for head in range(heads)
    ]
    steps = sorted(_steps(choices), reverse=True)
    return choices, [(head, step) for _, head, step in steps]


def _options(
    adapter: Adapter, layer: int, head: int, context: int, survivors: bool
) -> Iterator[_Option]:
    """All that a head could hold. What it loses by a window is less by what its survivors catch."""
    captured = adapter.captured[layer, head]
    for window, lost in zip(adapter.windows, adapter.loss[layer, head], strict=True):
        if window >= context:
            break
        for kept in KEPT if survivors else (0,):
            share = kept / len(captured)
            caught = captured[kept - 1] if kept else 0.0
            entries = window + share * (context - window)
            yield _Option(entries, float(lost * (1 - caught)), Share(window, share))
    yield _Option(context, 0.0, Share(context, 0.0))


def _worthwhile(options: Iterator[_Option]) -> list[_Option]:
    """Those by which more entries lose less, each better for its entries than the next: the lower
    convex hull, from the fewest entries on."""
    hull: list[_Option] = []
    for option in sorted(options):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: _Option, after: _Option) -> float:
    """What an entry more gains."""
    return (before.loss - after.loss) / (after.entries - before.entries)


def _steps(choices: list[list[_Option]]) -> Iterator[tuple[float, int, int]]:
    """From option to option: what an entry of it gains, the head, and the index it leads to."""
    for head, options in enumerate(choices):
        for step in range(1, len(options)):
            yield _gain(options[step - 1], options[step]), head, step
