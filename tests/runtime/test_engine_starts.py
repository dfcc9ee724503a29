"""A text that is read once, and requests that begin with it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage import (
    Device,
    Execution,
    Plan,
    Recipe,
    TechniqueChoice,
    Workload,
    build_plan,
    resolve,
)
from ullage.errors import BudgetExceeded, DoesNotFit, InputError, PromptError
from ullage.kv.saved import FromFile
from ullage.runtime.banks import save, saved_start
from ullage.runtime.engine import Engine, Request
from ullage.runtime.load import LoadedModel, load_model, load_tokenizer
from ullage.specs.saved import read_saved
from ullage.techniques import Technique, as_typed, choice_of
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS
from ullage.units import GIB

MakeEngine = Callable[..., Engine]
BANK = CAMELoT(slots=20, segment=16, recent=8)
NUMBERS = torch.Generator().manual_seed(1)
MANUAL = torch.randint(6, 64, (150,), generator=NUMBERS).tolist()
QUESTIONS = [torch.randint(6, 64, (size,), generator=NUMBERS).tolist() for size in (5, 1, 40)]
NEW = 12


def plan_for(
    folder: Path,
    technique: Technique = BANK,
    sequences: int = 2,
    kv_dtype: str = "fp32",
    length: int = len(MANUAL),
) -> Plan:
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype, prefill_chunk=32)
    work = Workload(length + 40, NEW, sequences)
    device = Device("cpu", "cpu", 64 * GIB)
    return build_plan(
        Recipe(resolve(str(folder)), device, work, execution, (choice_of(technique),))
    )


@pytest.fixture(scope="module")
def loaded(model_folder: Callable[..., Path]) -> LoadedModel:
    folder = model_folder("llama")
    return load_model(plan_for(folder), folder, load_tokenizer(folder)).without_end()


@pytest.fixture
def engine(model_folder: Callable[..., Path], loaded: LoadedModel) -> MakeEngine:
    """`engine(technique=, sequences=, kv_dtype=)`"""

    def make(**options: Any) -> Engine:
        technique = options.get("technique", BANK)
        made = Engine(loaded, plan_for(model_folder("llama"), **options))
        loaded.attached.close()
        loaded.attached.enter_context(technique.attach(loaded.model))
        return made

    return make


def answers(engine: Engine, start: Any) -> list[list[int]]:
    return [list(engine.generate(Request(ids, NEW, start=start))) for ids in QUESTIONS]


@pytest.mark.parametrize("technique", [BANK, DMS(0.5, 16)], ids=str)
def test_each_question_is_answered_as_behind_the_text(
    engine: MakeEngine, technique: Technique
) -> None:
    """One after the other, and all at once; the text is held as it was."""
    made = engine(technique=technique, sequences=4)
    whole = [list(made.generate(Request(MANUAL + ids, NEW))) for ids in QUESTIONS]
    with made.reading(MANUAL) as manual:
        assert answers(made, manual) == whole
        together = [Request(ids, NEW, start=manual) for ids in QUESTIONS]
        for request in together:
            made.submit(request)
        while not made.idle:
            made.step()
        assert [request.output_ids for request in together] == whole
        assert manual.length == len(MANUAL)
    made.pool.check_integrity(all_free=True)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
def test_a_saved_text_is_as_good_as_one_that_is_held(
    engine: MakeEngine, tmp_path: Path, kv_dtype: str
) -> None:
    path, made = tmp_path / "manual.bank", engine(kv_dtype=kv_dtype)
    with made.reading(MANUAL) as manual:
        save(manual, made, path, "manual", "")
        held = answers(made, manual)
    again = engine(kv_dtype=kv_dtype)
    assert answers(again, saved_start(read_saved(path), again)) == held
    again.pool.check_integrity(all_free=True)


def test_more_is_read_behind_what_was_read(engine: MakeEngine) -> None:
    made = engine(sequences=3)
    with made.reading(MANUAL[:70]) as half, made.reading(MANUAL[70:], half) as rest:
        assert rest.length == len(MANUAL)
        found = answers(made, rest)
    with made.reading(MANUAL) as manual:
        assert answers(made, manual) == found


def test_what_is_held_is_counted(engine: MakeEngine) -> None:
    """A request that would wait for it for ever is refused, and the engine goes on."""
    made = engine(sequences=1)
    with made.reading(MANUAL) as manual:
        request = Request(QUESTIONS[0], NEW, start=manual)
        with pytest.raises(BudgetExceeded):
            list(made.generate(request))
        assert request.broken
        with pytest.raises(BudgetExceeded), made.reading(MANUAL):
            pass
    assert len(list(made.generate(Request(MANUAL, NEW)))) == NEW
    made.pool.check_integrity(all_free=True)


def test_what_is_too_long_is_refused(engine: MakeEngine) -> None:
    made = engine()
    with pytest.raises(PromptError, match="empty"), made.reading([]):
        pass
    dms = engine(technique=DMS(0.5, 16), sequences=1)
    with pytest.raises(PromptError, match="more than the 256"), dms.reading(MANUAL * 2):
        pass
    with pytest.raises(DoesNotFit), dms.reading(MANUAL + MANUAL[:90]):
        pass
    with dms.reading(MANUAL) as manual, pytest.raises(PromptError, match="more than the 256"):
        dms.submit(Request(MANUAL[:100], NEW, start=manual))


def test_a_reading_that_is_broken_off_gives_its_blocks_back(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine()

    def interrupt(done: int, _: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), made.reading(MANUAL, on_prefill=interrupt):
        pass
    assert made.idle
    made.pool.check_integrity(all_free=True)


def test_a_file_that_is_damaged_breaks_its_request_alone(
    engine: MakeEngine, tmp_path: Path
) -> None:
    path, made = tmp_path / "manual.bank", engine()
    with made.reading(MANUAL) as manual:
        save(manual, made, path, "manual", "")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    request = Request(QUESTIONS[0], NEW, start=FromFile(read_saved(path)))
    with pytest.raises(InputError, match="is damaged"):
        list(made.generate(request))
    assert request.broken
    assert made.idle
    made.pool.check_integrity(all_free=True)


def test_whom_a_file_is_not_good_for(
    engine: MakeEngine, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path, made = tmp_path / "manual.bank", engine()
    with made.reading(MANUAL) as manual:
        save(manual, made, path, "manual", "")
    found = read_saved(path)
    assert found.record.technique == as_typed(choice_of(BANK))
    with pytest.raises(InputError, match=r"read with camelot:slots=20,.*, not with camelot"):
        saved_start(found, engine(technique=CAMELoT(slots=21, segment=16, recent=8)))
    with pytest.raises(InputError, match="its entries are fp32, not int8"):
        saved_start(found, engine(kv_dtype="int8"))
    norm = made.loaded.model.model.norm.weight
    before = norm.detach().clone()
    try:
        with torch.no_grad():
            norm[0] += 1
        with pytest.raises(InputError, match="whose weights are not those of"):
            saved_start(found, engine())
    finally:
        with torch.no_grad():
            norm.copy_(before)
    rope = made.loaded.model.config.rope_parameters
    found_theta = rope["rope_theta"]
    try:
        rope["rope_theta"] = int(found_theta)  # the same, written otherwise
        assert saved_start(found, engine()).length == len(MANUAL)
        rope["rope_theta"] = 2 * found_theta
        with pytest.raises(InputError, match=r"as it turned keys by .*rope_theta"):
            saved_start(found, engine())
    finally:
        rope["rope_theta"] = found_theta


def test_settings_that_are_left_out_are_those_that_are_named(
    engine: MakeEngine, tmp_path: Path
) -> None:
    """Python may name only some; the command line names all."""
    path, made = tmp_path / "manual.bank", engine()
    few = (TechniqueChoice("camelot", {"slots": 20, "segment": 16, "recent": 8}),)
    plan = replace(made.plan, recipe=replace(made.plan.recipe, techniques=few))
    terse = Engine(made.loaded, plan)
    for reader, other in ((made, terse), (terse, made)):
        with reader.reading(MANUAL) as manual:
            save(manual, reader, path, "manual", "")
        found = read_saved(path)
        assert found.record.technique == as_typed(choice_of(BANK))
        assert saved_start(found, other).length == len(MANUAL)


def test_a_text_is_gone_on_from_with_the_frequencies_it_was_read_with(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Some models have others for longer sequences, and keys that are turned stay as they are."""
    rope = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder, path = model_folder("phi3", "float32", json.dumps(rope)), tmp_path / "manual.bank"

    def engine_for(tokens: int) -> Engine:
        execution = Execution(dtype="fp32", kv_dtype="fp32", prefill_chunk=32)
        device, chain = Device("cpu", "cpu", 64 * GIB), (choice_of(BANK),)
        work = Workload(tokens - NEW, NEW)
        plan = build_plan(Recipe(resolve(str(folder)), device, work, execution, chain))
        return Engine(load_model(plan, folder, load_tokenizer(folder)), plan)

    short, long = engine_for(64), engine_for(65)
    with short.reading(MANUAL[:50]) as manual:
        save(manual, short, path, "manual", "")
    assert saved_start(read_saved(path), engine_for(60)).length == 50
    with pytest.raises(InputError, match=r"more than 64 tokens, .*: ask for fewer new tokens"):
        saved_start(read_saved(path), long)
    with long.reading(MANUAL[:50]) as manual:
        save(manual, long, path, "manual", "")
    with pytest.raises(InputError, match=r"more than 64 tokens, .*: plan for more"):
        saved_start(read_saved(path), short)


def test_frequencies_stay_where_a_text_is_longer_than_the_context(
    model_folder: Callable[..., Path],
) -> None:
    """Those that would change with its length are the default's within the context."""
    found = []
    for rope in ("", json.dumps({"rope_type": "dynamic", "factor": 4.0})):
        folder = model_folder("llama", "float32", rope)
        plan = plan_for(folder, length=3 * len(MANUAL))
        made = Engine(load_model(plan, folder, load_tokenizer(folder)).without_end(), plan)
        with made.loaded.attached:
            found.append(list(made.generate(Request(3 * MANUAL, NEW))))
    assert len(found[0]) == NEW
    assert found[1] == found[0]


def test_what_keeps_every_entry_is_not_saved(engine: MakeEngine, tmp_path: Path) -> None:
    made = engine(technique=DMS(0.5, 16))
    with made.reading(MANUAL) as manual, pytest.raises(InputError, match="camelot"):
        save(manual, made, tmp_path / "bank", "manual", "")
    assert list(tmp_path.iterdir()) == []
