"""What the readout learns of facts: in closed form, and by steps that can be broken off."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage.errors import TechniqueError
from ullage.kv.cache import cache_argument
from ullage.kv.fingerprint import fingerprint
from ullage.techniques.larimar import training
from ullage.techniques.larimar.adapter import ADAPTERS, Adapter
from ullage.techniques.larimar.asked_facts import AskedFact
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.facts import FactMemory
from ullage.techniques.larimar.latent import Basis
from ullage.techniques.larimar.training import (
    FACTS,
    SAVED_STEPS,
    Example,
    Examples,
    Point,
    Saved,
    Trainer,
    fitted,
    trained,
)

STEPS = 2 * SAVED_STEPS + 3
CPU = torch.device("cpu")


def fact(number: int) -> AskedFact:
    subject, answer = f"w{10 + number}", f"w{30 + number} w{31 + number}"
    prompt = f"{subject} w7"
    questions = (prompt, f"w8 {subject} w9")
    return AskedFact(Fact.make(prompt=prompt, answer=answer, subject=subject), questions)


FACTS_OF = [fact(number) for number in range(12)]


@pytest.fixture
def learning(model: Any, tokenizer: Any) -> Callable[..., Trainer]:
    """`learning(model=, rank=, steps=)`: a trainer that has not begun, of the tiny llama."""

    def begun(model: Any = model, rank: int = 4, steps: int = STEPS) -> Trainer:
        made = Examples(model, tokenizer)
        examples = list(made.of(FACTS_OF))
        return Trainer(model, fitted(examples, rank, CPU), examples, made.turns, steps)

    return begun


def ignored(_: Any) -> None:
    pass


def entries_of(examples: list[Example]) -> torch.Tensor:
    return torch.cat([example.entries for example in examples]).float()


def test_an_example_is_a_fact_and_its_questions(model: Any, tokenizer: Any) -> None:
    """With as many turns as its longest text has tokens."""
    made = Examples(model, tokenizer)
    examples = list(made.of(FACTS_OF))
    for asked, example in zip(FACTS_OF, examples, strict=True):
        assert example.entries.shape == (len(example.bias), 2, 2, 2, 8)
        assert example.entries.dtype == torch.float16
        for question, text in zip(asked.questions, example.asked, strict=True):
            own = tokenizer(question)["input_ids"]
            assert text.ids[: text.begins] == own
            assert tokenizer.decode(text.ids[text.begins :]) == asked.fact.answer
    assert all(len(cos) >= len(examples[0].bias) for cos, _ in made.turns)


def test_an_answer_is_what_its_tokenizer_makes_of_it_behind_a_question(
    model: Any, tokenizer: Any
) -> None:
    """Whatever that puts around a text."""
    from tokenizers.processors import TemplateProcessing

    wrapped = deepcopy(tokenizer)  # others share it
    wrapped._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    ((first, _),) = [example.asked for example in Examples(model, wrapped).of(FACTS_OF[:1])]
    assert wrapped.decode(first.ids) == "<bos> w10 w7 w30 w31"
    assert first.begins == 3


def test_the_closed_form_loses_less_than_others(learning: Callable[..., Trainer]) -> None:
    """Of as many numbers: a random basis, and its own with less of a rank."""
    examples = list(learning().examples)
    entries = entries_of(examples)

    def lost(basis: Basis) -> float:
        off = basis.centred(basis.entries(basis.latents(entries))) - basis.centred(entries)
        return float(off.square().mean())

    best, less = fitted(examples, 8, CPU), fitted(examples, 4, CPU)
    random = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(64, 8, generator=random)).Q.T
    by_chance = Basis(best.mean, best.scale[..., 0, 0], rows)
    assert lost(best) < lost(less) < 1
    assert lost(best) < 0.9 * lost(by_chance)
    torch.testing.assert_close(best.rows @ best.rows.T, torch.eye(8), atol=1e-4, rtol=0)
    exact = torch.linalg.svdvals(best.centred(entries)).square()
    assert lost(best) == pytest.approx(float(exact[8:].sum() / exact.sum()), rel=1e-3)
    assert lost(best) * len(entries) * 64 == pytest.approx(float(exact[8:].sum()), rel=1e-3)


def test_a_rank_is_as_large_as_its_facts_allow(model: Any, tokenizer: Any) -> None:
    examples = list(Examples(model, tokenizer).of(FACTS_OF[:2]))
    count = len(entries_of(examples))
    assert count < 64
    assert fitted(examples, 64, CPU).rows.shape == (count, 64)


def test_fitting_leaves_randomness_alone(learning: Callable[..., Trainer]) -> None:
    examples = list(learning().examples)
    before = torch.random.get_rng_state()
    first = fitted(examples, 4, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    assert torch.equal(fitted(examples, 4, CPU).rows, first.rows)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gemma2"])
def test_steps_lower_the_loss(
    tiny_model: Callable[..., Any],
    learning: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    monkeypatch.setattr(training, "RATE", 0.1)
    trainer = learning(tiny_model(family)[0], steps=60)
    points = [trainer.step() for _ in range(60)]
    assert sum(point.loss for point in points[-9:]) < 0.9 * sum(point.loss for point in points[:9])


def test_the_loss_is_that_of_what_is_read(
    model: Any, tokenizer: Any, learning: Callable[..., Trainer]
) -> None:
    """Of a batch the first step's is what a memory with this adapter makes of its prompts, some
    tokens of which were written."""
    trainer = learning(rank=8)
    examples, asked = training._drawn(trainer.examples, 0)
    with torch.no_grad(), training._frozen(model):
        loss, _ = trainer._losses(examples, asked)
    losses: list[torch.Tensor] = []
    adapter = trainer.basis.adapter(fingerprint(model), {})
    with torch.no_grad(), FactMemory(model, tokenizer, adapter=adapter) as memory:
        for known in FACTS_OF:
            memory.write(
                prompt=known.fact.prompt, answer=known.fact.answer, subject=known.fact.subject
            )
        for text in asked:
            out = model(torch.tensor([text.ids[: text.begins]]), use_cache=True)
            for token in text.ids[text.begins :]:
                losses.append(-out.logits[0, -1].log_softmax(-1)[token])
                out = model(torch.tensor([[token]]), **cache_argument(model, out.past_key_values))
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_on_is_never_having_stopped(
    model: Any, learning: Callable[..., Trainer], tmp_path: Path, dtype: str
) -> None:
    """To the bit, from the last steps that were saved."""
    model.to(getattr(torch, dtype))
    unbroken = learning()
    trained(unbroken, Saved(tmp_path / "unbroken", "a test", None), ignored, ignored)
    file, resumed, watched = tmp_path / "state", list[int](), list[Point]()

    def interrupted(point: Point) -> None:
        watched.append(point)
        if len(watched) == SAVED_STEPS + 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(learning(), Saved.found(file, "a test"), interrupted, resumed.append)
    assert not resumed
    watched.clear()
    broken = learning()
    trained(broken, Saved.found(file, "a test"), watched.append, resumed.append)
    assert resumed == [SAVED_STEPS]
    assert watched == broken.history == unbroken.history
    assert len(watched) == STEPS
    assert torch.equal(broken.basis.rows, unbroken.basis.rows)


def test_what_is_told_of_is_saved(learning: Callable[..., Trainer], tmp_path: Path) -> None:
    file = tmp_path / "state"
    there: list[bool] = []
    trained(learning(), Saved(file, "a test", None), lambda _: there.append(file.exists()), ignored)
    assert there == [False] * (SAVED_STEPS - 1) + [True] * (STEPS - SAVED_STEPS + 1)


def test_no_steps_are_the_closed_form(learning: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = learning(steps=0)
    rows = trainer.basis.rows.clone()
    trained(trainer, Saved.found(tmp_path / "state", "a test"), ignored, ignored)
    assert torch.equal(trainer.basis.rows, rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"), [(None, "other settings"), (b"", "damaged"), (b"x" * 99, "damaged")]
)
def test_another_training_is_not_gone_on_with(
    learning: Callable[..., Trainer], tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "state"
    trained(learning(steps=10), Saved.found(file, "another"), ignored, ignored)
    if content is not None:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(TechniqueError, match=says):
        Saved.found(file, "a test")
    assert file.read_bytes() == before


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_model_is_its_own_afterwards(
    model: Any, learning: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    model.lm_head.weight.requires_grad_(False)
    model.set_attn_implementation("sdpa")
    trainer, ids = learning(), torch.tensor([[6, 7, 8]])
    before = model(ids).logits
    if error is not None:
        monkeypatch.setattr(trainer, "_losses", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            trainer.step()
    else:
        trainer.step()
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    taking = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert taking == {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
    assert all(weight.grad is None for weight in model.parameters())


def test_all_facts_come_by_before_one_does_again() -> None:
    """In another order each time, and the same whenever they are drawn."""
    empty = torch.zeros(1)
    examples = [
        Example(empty, empty, (training.Asked([number], 0), training.Asked([-number], 0)))
        for number in range(1, 13)
    ]
    drawn = [training._drawn(examples, step) for step in range(3)]
    for (facts, asked), (again, same) in zip(
        drawn, [training._drawn(examples, step) for step in range(3)], strict=True
    ):
        assert [id(example) for example in facts] == [id(example) for example in again]
        assert asked == same
    numbers = [abs(text.ids[0]) for _, asked in drawn for text in asked]
    assert len(numbers) == 3 * FACTS
    assert sorted(numbers[:12]) == sorted(numbers[12:]) == list(range(1, 13))
    assert numbers[:12] != numbers[12:]


def test_what_was_learned_is_an_adapter_of_its_model(
    model: Any, tokenizer: Any, learning: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = learning()
    trainer.step()
    made: Adapter = trainer.basis.adapter(fingerprint(model), {"rank": 4})
    made.save(tmp_path / "made.safetensors")
    loaded = ADAPTERS.load(str(tmp_path / "made.safetensors"))
    with FactMemory(model, tokenizer, adapter=loaded) as memory:
        memory.write(prompt="w10 w7", answer="w30", subject="w10")
        kept = memory._held.hold(memory.facts[1])
        assert kept.numbers.shape[1] == 4
