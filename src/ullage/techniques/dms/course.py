"""A training that can be broken off: after each step all that going on takes is in a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from ullage.specs.learned import saved_state
from ullage.specs.whole import write_whole
from ullage.techniques.dms.adapter import Adapter
from ullage.techniques.dms.fingerprint import texts_fingerprint
from ullage.techniques.dms.sharing import shared_out
from ullage.techniques.dms.training import Course, Point, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def course_to(ratio: float, tokens: int, steps: int, layers: list[int], adapter: Adapter) -> Course:
    """To hold a `ratio`-th of the entries of `tokens` tokens, shared out as `adapter` says.

    Raises:
        TechniqueError: that is below the adapter's least window.
    """
    shares = shared_out(adapter, tokens / ratio, tokens)
    windows = tuple(tuple(share.window for share in layer) for layer in shares)
    kept = [share.kept for layer in shares for share in layer if share.window < tokens]
    return Course(layers, windows, 1 - sum(kept) / len(kept), steps)


def trained(
    model: "PreTrainedModel",
    adapter: Adapter,
    texts: Sequence[torch.Tensor],
    course: Course,
    file: Path,
    watch: Callable[[Point], None],
    resumed: Callable[[int], None] = lambda steps: None,
) -> tuple[Adapter, list[Point]]:
    """`adapter` with a trained predictor, and the steps: one for each of `texts`, [T] token ids
    each. Goes on from `file` where there is one, and tells `resumed` behind how many steps; `watch`
    is told of each step that is saved, of earlier ones too.

    Raises:
        TechniqueError: `file` is of another training, or damaged.
    """
    trainer = Trainer(model, course, torch.from_numpy(adapter.predictors["linear"]))
    asked = json.dumps([asdict(course), adapter.fingerprint, texts_fingerprint(texts)])
    if file.exists():
        trainer.go_on(saved_state("dms", file, asked))
        resumed(len(trainer.history))
        for point in trainer.history:
            watch(point)
    for ids in texts[len(trainer.history) :]:
        point = trainer.step(ids)
        write_whole(file, save(trainer.state(), {"training": asked}))
        watch(point)
    learned = {"dms": trainer.weights.detach().cpu().numpy()}
    return replace(adapter, predictors=adapter.predictors | learned), trainer.history
