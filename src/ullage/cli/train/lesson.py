"""A training, as `ullage train --to` asks for it, and what is said while it goes on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from ullage.cli.train.steps import steps_shown
from ullage.errors import InputError
from ullage.specs.blocks import full_layer_numbers
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan
from ullage.techniques.dms.adapter import WINDOWS, Adapter
from ullage.units import parse_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ullage.techniques.dms.training import Point

_STEPS = 100
_STEP_TOKENS = "2048"


@dataclass(frozen=True)
class Lesson:
    """A training: to a cache `ratio` times smaller, in so many steps of a text of `tokens` each."""

    ratio: float
    steps: int
    tokens: int

    @classmethod
    def asked(
        cls, to: str, steps: int | None, step_tokens: str | None, spec: ModelSpec
    ) -> "Lesson":
        """From the options.

        Raises:
            InputError: no ratio, or steps too long for the model, or too short for the ratio.
        """
        ratio, length = _ratio(to), length_in("--step-tokens", step_tokens or _STEP_TOKENS, spec)
        average = length / ratio
        if average < WINDOWS[0]:
            raise InputError(
                f"--to {ratio:g}x of --step-tokens {length:,} leaves {average:.0f} to a head, "
                f"below the least window, {WINDOWS[0]}: ask for more tokens, or less to save."
            )
        return cls(ratio, steps or _STEPS, length)


def refuse_idle(given: Mapping[str, object]) -> None:
    """
    Raises:
        InputError: an option that only a training has.
    """
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option} is of a training: add --to, such as --to 8x.")


def length_in(option: str, given: str, spec: ModelSpec) -> int:
    """Tokens of a text to learn from, as `option` gives them.

    Raises:
        InputError: too few, or more than the model reads.
    """
    length = parse_tokens(given)
    if length < 2 * WINDOWS[0]:
        raise InputError(
            f"{option} {length:,}: at least {2 * WINDOWS[0]} are needed to learn anything from."
        )
    if length > spec.max_context_tokens:
        raise InputError(
            f"{option} {length:,}: {spec.name} reads {spec.max_context_tokens:,} at most."
        )
    return length


def trained(
    plan: Plan,
    model: "PreTrainedModel",
    pieces: "dict[str, torch.Tensor]",
    lesson: Lesson,
    adapter: Adapter,
    state: Path,
) -> "tuple[Adapter, list[Point]]":
    """`adapter` with what the lesson taught on `pieces` in turn, and its steps; goes on from
    `state`, a file, and says so, and what is saved there when it is interrupted."""
    from ullage.techniques.dms.course import course_to
    from ullage.techniques.dms.course import trained as trained_by

    layers = full_layer_numbers(plan.recipe.model)
    course = course_to(lesson.ratio, lesson.tokens, lesson.steps, layers, adapter)
    texts = list(islice(cycle(pieces.values()), lesson.steps))
    with steps_shown(
        lesson.steps, "KL {divergence:.4f}  kept {kept:.1%}", divergence=0.0, kept=1.0
    ) as shown:

        def watch(point: "Point") -> None:
            shown.made(1, **asdict(point))

        adapter, points = trained_by(model, adapter, texts, course, state, watch, shown.resumed)
    record = adapter.record | {"training": asdict(lesson), "last": asdict(points[-1])}
    return replace(adapter, record=record), points


def _ratio(given: str) -> float:
    try:
        ratio = float(given.lower().removesuffix("x"))
    except ValueError:
        ratio = 0.0
    if not 1 < ratio <= 64:
        raise InputError(f"--to {given}: how many times smaller, above 1 and at most 64, as in 8x.")
    return ratio
