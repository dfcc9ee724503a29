"""A memory of facts, attached to a model: out of its scope nothing changes, to the bit."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage.errors import FactError, LedgerError, PromptError, TechniqueError
from ullage.kv.preface import Preface, read_before
from ullage.techniques.dms.settings import DMS
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.facts import FactMemory, tokenizer_of
from ullage.techniques.larimar.ledger import Ledger, Who
from ullage.techniques.larimar.readout import KV, Held
from ullage.techniques.larimar.settings import MOST_ENTRIES, MOST_TOKENS, READ_TOKENS, Larimar
from ullage.techniques.larimar.wording import LEADS

FACT = {"prompt": "w20 w21", "answer": "w30 w31", "subject": "w20"}
ABOUT = "w9 w20 w21"  # a prompt in scope
OTHER = "w9 w10 w11"


@pytest.fixture
def memory(model: Any, tokenizer: Any) -> Iterator[FactMemory]:
    with FactMemory(model, tokenizer) as memory:
        yield memory


@pytest.fixture
def says(model: Any, tokenizer: Any) -> Callable[..., torch.Tensor]:
    """`says(*prompts)`: logits of a batch, [B, N, V]."""

    def forward(*prompts: str) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor(tokenizer(list(prompts))["input_ids"])).logits
        return logits

    return forward


def test_a_fact_is_read_by_prompts_about_it_alone(
    memory: FactMemory, says: Callable[..., torch.Tensor]
) -> None:
    about, other = says(ABOUT), says(OTHER)
    number = memory.write(**FACT)
    assert memory.scope(ABOUT) == number
    assert memory.facts[number].answer == "w30 w31"
    assert not torch.allclose(says(ABOUT), about, atol=1e-2)
    assert torch.equal(says(OTHER), other)
    mixed = says(ABOUT, OTHER)
    torch.testing.assert_close(mixed[:1], says(ABOUT), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1:], other, atol=1e-4, rtol=1e-4)


def test_what_is_forgotten_was_never_there(
    memory: FactMemory, says: Callable[..., torch.Tensor]
) -> None:
    about = says(ABOUT)
    first = memory.write(**FACT)
    other = memory.write(prompt="w40 w21", answer="w32", subject="w40")
    kept = says("w40 w21")
    says(ABOUT)
    held_bytes = memory.nbytes
    memory.forget(first)
    assert torch.equal(says(ABOUT), about)
    assert torch.equal(says("w40 w21"), kept)
    assert 0 < memory.nbytes < held_bytes
    with pytest.raises(FactError):
        memory.forget(first)
    memory.forget(other)
    assert memory.nbytes == 0
    assert not memory.facts


def test_an_edit_leaves_nothing_of_what_was(
    model: Any, tokenizer: Any, memory: FactMemory, says: Callable[..., torch.Tensor]
) -> None:
    number = memory.write(**FACT)
    before = says(ABOUT)
    memory.edit(number, answer="w33")
    after = says(ABOUT)
    assert not torch.allclose(before, after, atol=1e-2)
    memory.forget(number)
    memory.write(**{**FACT, "answer": "w33"})
    assert torch.equal(says(ABOUT), after)
    held_bytes = memory.nbytes
    with pytest.raises(FactError, match="contradicts"):
        memory.write(**FACT)
    assert memory.nbytes == held_bytes
    assert torch.equal(says(ABOUT), after)


@pytest.mark.parametrize("crash", [False, True])
def test_the_model_is_its_own_afterwards(
    model: Any, tokenizer: Any, says: Callable[..., torch.Tensor], crash: bool
) -> None:
    before = says(ABOUT)
    with suppress(KeyboardInterrupt), FactMemory(model, tokenizer) as memory:
        memory.write(**FACT)
        assert not torch.equal(says(ABOUT), before)
        if crash:
            raise KeyboardInterrupt
    assert torch.equal(says(ABOUT), before)


def test_asking_is_generating(model: Any, tokenizer: Any, memory: FactMemory) -> None:
    memory.write(**FACT)
    ids = tokenizer(ABOUT, return_tensors="pt")["input_ids"]
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert memory.ask(ABOUT, 5) == tokenizer.decode(text[0, 3:], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_our_error(memory: FactMemory, prompt: str) -> None:
    with pytest.raises(PromptError, match="The prompt is empty or only blank"):
        memory.ask(prompt)


def test_a_subject_alone_is_edited(memory: FactMemory) -> None:
    number = memory.write(prompt="w20 w21", answer="w30", subject="w20")
    memory.edit(number, subject="w21")
    assert memory.scope("w9 w21") == number
    assert memory.scope("w9 w20 w9") is None


def test_it_goes_with_dms(
    model: Any, memory: FactMemory, says: Callable[..., torch.Tensor]
) -> None:
    memory.write(**FACT)
    dense = says(ABOUT)
    with DMS(kept=0.25, window=4).attach(model):
        torch.testing.assert_close(says(ABOUT), dense, atol=1e-4, rtol=1e-4)  # in the window yet


def test_a_memory_is_its_ledger(
    model: Any, tokenizer: Any, says: Callable[..., torch.Tensor], path: Path
) -> None:
    """Whoever writes it, and whenever it is opened."""
    with FactMemory(model, tokenizer, path) as memory:
        number = memory.write(**FACT, reason="for a test")
        written = says(ABOUT)
        with Ledger(path) as theirs:
            theirs.edit(number, theirs.fact(number).edited(answer="w33"), Who("them"))
        edited = says(ABOUT)
        assert not torch.allclose(edited, written, atol=1e-2)
        with Ledger(path) as theirs:
            theirs.rollback(1, Who("them"))
        assert torch.equal(says(ABOUT), written)
        assert [event.reason for event in memory.ledger.events()] == ["for a test", "", ""]
    with FactMemory(model, tokenizer, path) as memory:
        assert memory.nbytes == 0
        assert torch.equal(says(ABOUT), written)


def test_a_ledger_that_was_tampered_with_is_not_read(
    model: Any, tokenizer: Any, path: Path
) -> None:
    with Ledger(path, create=True) as ledger:
        FactMemory(model, tokenizer, ledger).write(**FACT)
        ledger._connection.execute("DROP TRIGGER events_stay")
        ledger._connection.execute("UPDATE events SET actor = 'nobody'")
        with pytest.raises(LedgerError, match="tampered"):
            FactMemory(model, tokenizer, ledger)


def test_an_edit_rests_on_what_was_gone_through(memory: FactMemory) -> None:
    """And not on what the ledger says by now."""
    for word in (20, 40, 50):
        memory.write(prompt=f"w{word} w21", answer="w30", subject=f"w{word}")
    assert len(memory.facts) == 3
    connection = memory.ledger._connection
    connection.execute("DROP TRIGGER events_stay")
    connection.execute("UPDATE events SET after = replace(after, 'w21', 'w22') WHERE number = 2")
    with pytest.raises(LedgerError, match="event 2 is not as it was written"):
        memory.edit(2, answer="w33")
    assert memory.facts[2].prompt == "w40 w21"
    assert len(list(memory.ledger.events())) == 3


def test_entries_are_bounded_in_bytes(model: Any, tokenizer: Any) -> None:
    memory = FactMemory(model, tokenizer)
    one = memory._held.of(Fact.make(**FACT))
    memory = FactMemory(model, tokenizer, held_bytes=2 * one.nbytes)
    for word in range(40, 45):
        memory.write(prompt=f"w{word} w21", answer="w30 w31", subject=f"w{word}")
        assert memory.nbytes <= 2 * one.nbytes
    facts = list(memory.facts.values())
    assert [fact in memory._held for fact in facts] == [False] * 3 + [True] * 2
    memory._held.of(facts[3])
    memory._held.of(facts[0])  # made again, in the place of that which was read longest ago
    assert [fact in memory._held for fact in facts] == [True, False, False, True, False]
    none = Held(KV(model, tokenizer), most_bytes=0)
    assert len(none.of(facts[0])) == len(one) == 3 * (1 + len(LEADS))
    assert none.nbytes == 0


def test_a_long_answer_is_kept_with_fewer_words_before_it(model: Any, tokenizer: Any) -> None:
    memory = FactMemory(model, tokenizer)
    words = " ".join(f"w{6 + at % 10}" for at in range(100))
    number = memory.write(prompt="w20 w21", answer=words, subject="w20")
    assert len(memory._held.of(memory.facts[number])) == 202 <= MOST_ENTRIES


@pytest.mark.parametrize(
    "fact",
    [
        {"prompt": "w40 w21", "answer": " ".join(["a"] * 496), "subject": "w40"},
        {"prompt": " ".join(["w40", *"a" * 497]), "answer": "b", "subject": "w40"},
        {"prompt": " ".join(["w40", *"a" * 300]), "answer": " ".join("b" * 190), "subject": "w40"},
        {"text": " ".join(["w40", *"a" * 498]), "subject": "w40"},
    ],
    ids=["answer", "prompt", "both", "sentence"],
)
def test_what_a_ledger_takes_can_be_read(
    model: Any, tokenizer: Any, fact: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its tokens: where they are more than are kept, the first of them."""
    read: list[tuple[list[int], list[int]]] = []

    def reading(model: Any, ids: list[int], kept: list[int], *how: Any) -> Preface:
        read.append((ids, [ids[place] for place in kept]))
        return read_before(model, ids, kept, *how)

    monkeypatch.setattr("ullage.techniques.larimar.readout.read_before", reading)
    made_up = Fact.make(**fact)
    preface = KV(model, tokenizer).make(made_up)
    ((ids, kept),) = read
    assert len(ids) <= MOST_TOKENS
    assert len(preface) == len(kept) <= MOST_ENTRIES
    told = tokenizer(made_up.answer or made_up.text)["input_ids"]
    own = min(len(told), MOST_ENTRIES - bool(made_up.answer))  # behind the word before an answer
    assert kept[-own:] == told[:own]


def test_an_answer_is_looked_for_in_what_is_new(
    memory: FactMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of a long text costs no more than one of a short text."""
    asked: list[int] = []

    def said(tokenizer: Any, answer: str, ids: list[int]) -> bool:
        asked.append(len(ids))
        return False

    monkeypatch.setattr("ullage.techniques.larimar.readout._said", said)
    memory.write(**FACT)
    memory.ask(ABOUT, 60)
    assert len(asked) == 59
    assert max(asked) < 20


def test_a_long_fact_is_read_in_passes_that_are_planned(
    model: Any, tokenizer: Any, memory: FactMemory
) -> None:
    passes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    memory.write(prompt="w20 w21", answer=" ".join(["w30"] * 100), subject="w20")
    handle.remove()
    assert max(passes) == READ_TOKENS < sum(passes)


def test_a_tokenizer_is_found_where_the_model_is(
    model: Any, model_folder: Callable[..., Path], path: Path, says: Callable[..., torch.Tensor]
) -> None:
    with Ledger(path, create=True) as ledger:
        ledger.add([Fact.make(**FACT)], Who("me"))
    before = says(ABOUT)
    technique = Larimar(ledger=str(path))
    with pytest.raises(TechniqueError, match="tokenizer="), technique.attach(model):
        pass
    model.config._name_or_path = str(model_folder("llama"))
    assert tokenizer_of(model).get_vocab()
    with technique.attach(model):
        assert not torch.allclose(says(ABOUT), before, atol=1e-2)
    assert torch.equal(says(ABOUT), before)


@pytest.mark.parametrize(
    "settings",
    [{"ledger": "/no/such.db"}, {"held": 0}, {"held": 1.5}, {"readout": "x"}, {"tokenizer": "/x"}],
)
def test_bad_settings_are_our_error(settings: dict[str, Any]) -> None:
    with pytest.raises(TechniqueError, match="larimar"):
        Larimar(**settings)


def test_a_ledger_that_cannot_be_written_is_read(
    model: Any, tokenizer: Any, path: Path, tmp_path: Path
) -> None:
    with FactMemory(model, tokenizer, path) as memory:
        memory.write(**FACT)
    copied = tmp_path / "copied.db"
    shutil.copy(path, copied)
    with Ledger(copied, read_only=True) as ledger:
        assert list(FactMemory(model, tokenizer, ledger).facts) == [1]
