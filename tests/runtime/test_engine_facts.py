"""Requests whose prompts name what a fact is about, in the engine."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from ullage import Device, Execution, Recipe, Workload, build_plan, resolve
from ullage.kv.fingerprint import fingerprint
from ullage.kv.rows import FullRow
from ullage.runtime.engine import Engine, Request
from ullage.runtime.load import load_model, load_tokenizer
from ullage.techniques import Technique, choice_of
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS
from ullage.techniques.larimar.adapter import Adapter
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who
from ullage.techniques.larimar.settings import Larimar
from ullage.units import GIB

NEW = 8
SUBJECT = 63
FILLER = torch.randint(6, 60, (30,), generator=torch.Generator().manual_seed(1)).tolist()
ABOUT = [*FILLER[:20], SUBJECT, *FILLER[20:]]  # the subject comes in the second chunk of 16
OTHER = FILLER
OTHERS = [None, DMS(kept=0.5, window=8), CAMELoT(slots=20, segment=16, recent=8)]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "facts.db"
    with Ledger(path, create=True) as ledger:
        fact = Fact.make(prompt=f"w{SUBJECT} w9", answer="w7 w8", subject=f"w{SUBJECT}")
        ledger.add([fact], Who("a test"))
    return path


def engine_with(folder: Path, *chain: Technique | None, kv_dtype: str = "fp32") -> Engine:
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype, prefill_chunk=16)
    work = Workload(len(ABOUT), NEW, sequences=2)
    chosen = tuple(choice_of(technique) for technique in chain if technique is not None)
    device = Device("cpu", "cpu", 64 * GIB)
    plan = build_plan(Recipe(resolve(str(folder)), device, work, execution, chosen))
    return Engine(load_model(plan, folder, load_tokenizer(folder)).without_end(), plan)


def texts(engine: Engine, *prompts: list[int]) -> list[list[int]]:
    """Written together."""
    requests = [Request(ids, NEW) for ids in prompts]
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    return [request.output_ids for request in requests]


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("entries", OTHERS, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_a_request_is_answered_behind_its_fact(
    model_folder: Callable[..., Path],
    ledger: Path,
    entries: Technique | None,
    kv_dtype: str,
    first: bool,
) -> None:
    folder = model_folder("llama")
    plain = engine_with(folder, entries, kv_dtype=kv_dtype)
    facts = Larimar(str(ledger), held=1)
    chain = (facts, entries) if first else (entries, facts)
    knowing = engine_with(folder, *chain, kv_dtype=kv_dtype)
    with closing(plain.loaded), closing(knowing.loaded):
        about, other = texts(plain, ABOUT, OTHER)
        assert texts(knowing, OTHER) == texts(plain, OTHER) == [other]
        alone = texts(knowing, ABOUT)[0]
        assert alone != about
        assert texts(knowing, ABOUT, OTHER) == [alone, other]
        assert texts(knowing, OTHER, ABOUT) == [other, alone]
        assert knowing.pool.taken_bytes == 0
        with Ledger(ledger) as theirs:
            theirs.forget([1], Who("them"))
        assert texts(knowing, ABOUT, OTHER) == [about, other]
        assert knowing.plan.phases["decode"].kv_bytes >= plain.plan.phases["decode"].kv_bytes + (
            1 << 20
        )


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("entries", OTHERS[:2], ids=str)
def test_a_request_is_answered_behind_latents(
    model_folder: Callable[..., Path],
    ledger: Path,
    tmp_path: Path,
    entries: Technique | None,
    kv_dtype: str,
) -> None:
    """Beside whom nothing changes, and which are gone with their fact."""
    folder = model_folder("llama")
    plain = engine_with(folder, entries, kv_dtype=kv_dtype)
    random, adapter = torch.Generator().manual_seed(1), tmp_path / "made.safetensors"
    mean, basis = (torch.randn(*of, 2, 2, 8, generator=random).numpy() for of in ((2,), (8, 2)))
    of_model = fingerprint(plain.loaded.model)
    Adapter(mean, torch.ones(2, 2).numpy(), basis / 8, of_model, {}).save(adapter)
    facts = Larimar(str(ledger), "latent", str(adapter), held=1)
    knowing = engine_with(folder, facts, entries, kv_dtype=kv_dtype)
    with closing(plain.loaded), closing(knowing.loaded):
        about, other = texts(plain, ABOUT, OTHER)
        alone = texts(knowing, ABOUT)[0]
        assert alone != about
        assert texts(knowing, ABOUT, OTHER) == [alone, other]
        with Ledger(ledger) as theirs:
            theirs.forget([1], Who("them"))
        assert texts(knowing, ABOUT, OTHER) == [about, other]
        assert knowing.pool.taken_bytes == 0


def test_who_said_their_fact_begins_again_beside_others(
    model_folder: Callable[..., Path], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a first token that saw none: a pass inside a step of both."""
    said = False
    monkeypatch.setattr("ullage.techniques.larimar.readout._said", lambda *_: said)
    plain = engine_with(model_folder("llama"))
    knowing = engine_with(model_folder("llama"), Larimar(str(ledger)))
    (never,), (other,) = texts(knowing, ABOUT), texts(plain, OTHER)
    said = True
    with monkeypatch.context() as patched:
        patched.setattr(FullRow, "replace_first", lambda *_: None)
        (left,) = texts(knowing, ABOUT)
    (about,) = texts(knowing, ABOUT)
    assert len({tuple(text) for text in (never, left, about)}) == 3
    assert texts(knowing, ABOUT, OTHER) == [about, other]
    knowing.pool.check_integrity(all_free=True)


def test_what_cannot_be_read_breaks_its_request_alone(
    model_folder: Callable[..., Path], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(model_folder("llama"), Larimar(str(ledger)))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("ullage.techniques.larimar.readout.read_before", fail)
    with closing(engine.loaded):
        expected = texts(engine, OTHER)
        good, bad = Request(OTHER, NEW), Request(ABOUT, NEW)
        engine.submit(good)
        engine.step()
        with pytest.raises(torch.OutOfMemoryError):
            list(engine.generate(bad))
        assert bad.broken
        while not engine.idle:
            engine.step()
        assert [good.output_ids] == expected


def test_what_a_prompt_is_about_can_be_said_apart(
    model_folder: Callable[..., Path], ledger: Path
) -> None:
    """As a chat template has words of its own, which are about nothing."""
    engine = engine_with(model_folder("llama"), Larimar(str(ledger)))
    (read,), (bare,) = texts(engine, ABOUT), texts(engine, OTHER)
    assert list(engine.generate(Request(ABOUT, NEW, about_ids=OTHER))) != read
    assert list(engine.generate(Request(OTHER, NEW, about_ids=ABOUT))) != bare


def test_a_preface_that_finds_no_room_takes_none(
    model_folder: Callable[..., Path], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(model_folder("llama"), Larimar(str(ledger)))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr("ullage.kv.preface.Preface.put_before", fail)
        with pytest.raises(torch.OutOfMemoryError):
            list(engine.generate(Request(ABOUT, NEW)))
    engine.pool.check_integrity(all_free=True)
    assert texts(engine, OTHER)
