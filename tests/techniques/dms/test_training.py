"""Training a predictor on a tiny model."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage import ModelSpec
from ullage.errors import TechniqueError
from ullage.techniques.dms.adapter import Adapter
from ullage.techniques.dms.course import course_to, trained
from ullage.techniques.dms.measure import measure
from ullage.techniques.dms.training import Course, Point, Trainer

TinyModel = Callable[..., tuple[Any, ModelSpec]]
RANDOM = torch.Generator().manual_seed(3)
TEXTS = [torch.randint(6, 64, (160,), generator=RANDOM) for _ in range(12)]


def course_of(spec: ModelSpec, evicted: float = 0.75, steps: int = len(TEXTS)) -> Course:
    layers = list(range(spec.num_layers))
    return Course(layers, ((16,) * spec.num_kv_heads,) * spec.num_layers, evicted, steps)


def trainer_of(model: Any, spec: ModelSpec, **course: Any) -> Trainer:
    zeros = torch.zeros(spec.num_layers, spec.num_kv_heads, spec.hidden_size)
    return Trainer(model, course_of(spec, **course), zeros)


def test_what_is_asked_for_goes_step_by_step(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama", initializer_range=0.1)  # little is lost
    trainer = trainer_of(model, spec, steps=36)
    points = [trainer.step(ids[:80]) for ids in TEXTS * 3]
    assert points[0].kept > 0.9
    assert points[-1].kept < 0.4
    assert points[-1].divergence > points[0].divergence


def test_the_loss_is_the_divergence_of_the_predictions(tiny_model: TinyModel) -> None:
    """Where a head drops what leaves its window, that of a model with that window alone; where all
    is kept, none."""
    model, spec = tiny_model("llama")
    trainer = trainer_of(model, spec)
    with torch.no_grad():
        trainer.bias.fill_(-1e4)
    assert trainer.step(TEXTS[0]).divergence < 1e-6
    with torch.no_grad():
        trainer.bias.fill_(1e4)
    divergence = trainer.step(TEXTS[0]).divergence
    age = torch.arange(160)[:, None] - torch.arange(160)
    seen = (age >= 0) & ((age < 16) | (torch.arange(160) < 4))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        dense = model(TEXTS[0][None]).logits[0].log_softmax(-1)
        cut = model(TEXTS[0][None], attention_mask=seen[None, None]).logits[0].log_softmax(-1)
    wanted = (dense.exp() * (dense - cut)).sum(-1).mean()
    assert divergence == pytest.approx(float(wanted), rel=1e-3)


def test_a_head_that_loses_nothing_is_not_what_goes(tiny_model: TinyModel) -> None:
    """To let go of entries that never leave a window would be free."""
    model, spec = tiny_model("llama", initializer_range=0.1)
    course = course_of(spec)
    windows = ((400,) * spec.num_kv_heads, *course.windows[1:])
    zeros = torch.zeros(spec.num_layers, spec.num_kv_heads, spec.hidden_size)
    trainer = Trainer(model, replace(course, windows=windows), zeros)
    begun = trainer.bias.detach().clone()
    points = [trainer.step(ids[:80]) for ids in TEXTS]
    assert torch.equal(trainer.bias[0], begun[0])
    assert (trainer.bias[1:] > begun[1:]).all()
    assert points[-1].kept < points[0].kept


def test_the_model_is_as_it_was(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    needed = [weight.requires_grad for weight in model.parameters()]
    trainer_of(model, spec).step(TEXTS[0])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == needed
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training


def test_a_trainer_is_gone_with_its_last_step(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    trainer = trainer_of(model, spec)
    trainer.step(TEXTS[0])
    seen = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert seen() is None


@pytest.fixture
def begun(tiny_model: TinyModel) -> tuple[Any, Adapter, Course]:
    model, spec = tiny_model("llama")
    adapter = measure(model, TEXTS[:2], {})
    layers = list(range(spec.num_layers))
    return model, adapter, replace(course_of(spec), layers=layers)


def test_what_was_broken_off_goes_on_as_if_it_had_not_been(
    begun: tuple[Any, Adapter, Course], tmp_path: Path
) -> None:
    model, adapter, course = begun

    def stop(point: Point) -> None:
        seen.append(point)
        if len(seen) == 5:
            raise KeyboardInterrupt

    whole, points = trained(model, adapter, TEXTS, course, tmp_path / "one", lambda _: None)
    seen: list[Point] = []
    with pytest.raises(KeyboardInterrupt):
        trained(model, adapter, TEXTS, course, tmp_path / "two", stop)
    again: list[Point] = []
    parts, _ = trained(model, adapter, TEXTS, course, tmp_path / "two", again.append)
    assert again == points
    assert (whole.predictors["dms"] == parts.predictors["dms"]).all()


def test_a_training_of_other_settings_or_a_damaged_one_is_not_gone_on_with(
    begun: tuple[Any, Adapter, Course], tmp_path: Path
) -> None:
    model, adapter, course = begun
    file = tmp_path / "state"
    trained(model, adapter, TEXTS[:1], course, file, lambda _: None)
    with pytest.raises(TechniqueError, match="other settings"):
        trained(model, adapter, TEXTS[:1], replace(course, evicted=0.5), file, lambda _: None)
    others = [ids.flip(0) for ids in TEXTS[:1]]
    with pytest.raises(TechniqueError, match="other settings or texts"):
        trained(model, adapter, others, course, file, lambda _: None)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TechniqueError, match="is damaged"):
        trained(model, adapter, TEXTS[:1], course, file, lambda _: None)


def test_windows_and_survivors_are_as_many_as_was_asked_for(
    begun: tuple[Any, Adapter, Course],
) -> None:
    _, adapter, course = begun
    made = course_to(1.5, 160, 10, course.layers, adapter)
    windows = [window for layer in made.windows for window in layer]
    assert sum(windows) <= 160 / 1.5 * len(windows)
    assert 0.5 <= made.evicted <= 1
    assert made.asked(9) == made.evicted
    assert made.asked(0) < made.evicted / 4
