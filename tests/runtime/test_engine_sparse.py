"""The engine with rows of a technique: blocks as planned, texts as plain `generate` writes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ullage import build_plan, resolve
from ullage.errors import BudgetExceeded
from ullage.kv.cache import Sequence
from ullage.runtime.engine import Engine, Request
from ullage.runtime.load import load_model, load_tokenizer
from ullage.specs.device import Device
from ullage.specs.plan import Plan, Recipe
from ullage.specs.workload import Execution, Workload
from ullage.techniques import Technique, choice_of
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS
from ullage.units import GIB

ModelFolder = Callable[..., Path]
SPARSE, BANK = DMS(0.25, 16), CAMELoT(slots=20, segment=16, recent=8)
PROMPTS = [
    torch.randint(6, 64, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    for size in (150, 40, 97)
]
NEW = 20


def plan_for(folder: Path, sequences: int, kv_dtype: str, technique: Technique) -> Plan:
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype, prefill_chunk=32)
    work = Workload(max(map(len, PROMPTS)), NEW, sequences)
    device = Device("cpu", "cpu", 64 * GIB)
    recipe = Recipe(resolve(str(folder)), device, work, execution, (choice_of(technique),))
    return build_plan(recipe)


def engine_for(
    folder: Path, sequences: int, kv_dtype: str = "fp32", technique: Technique = SPARSE
) -> Engine:
    plan = plan_for(folder, sequences, kv_dtype, technique)
    loaded = load_model(plan, folder, load_tokenizer(folder)).without_end()
    return Engine(loaded, plan)


def run_all(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.submit(request)
    for _ in range(1000):
        if engine.idle:
            return
        engine.step()


def requests() -> list[Request]:
    return [Request(prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("technique", [SPARSE, BANK], ids=str)
@pytest.mark.parametrize("sequences", [1, 3])
def test_texts_are_those_of_plain_generate(
    model_folder: ModelFolder, sequences: int, technique: Technique
) -> None:
    engine = engine_for(model_folder("llama"), sequences, technique=technique)
    made = requests()
    run_all(engine, made)
    model = engine.loaded.model
    for request, prompt in zip(made, PROMPTS, strict=True):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        assert request.output_ids == output[0, len(prompt) :].tolist()
    assert engine.cache.nbytes() == 0


def test_a_text_may_be_longer_than_what_the_model_was_trained_on_beside_a_bank(
    model_folder: ModelFolder,
) -> None:
    """256 tokens; its pool is not larger for it."""
    engine = engine_for(model_folder("llama"), 1, technique=BANK)
    long = Request(PROMPTS[0] * 3, NEW)
    run_all(engine, [long])
    assert len(long.output_ids) == NEW
    assert engine.pool.taken_bytes == 0


@pytest.mark.parametrize("technique", [SPARSE, BANK], ids=str)
@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_the_pool_is_what_was_planned_and_smaller_than_a_dense_one(
    kv_dtype: str, model_folder: ModelFolder, technique: Technique
) -> None:
    engine = engine_for(model_folder("llama"), 2, kv_dtype, technique)
    decode = engine.plan.phases["decode"]
    recipe = engine.plan.recipe
    dense = build_plan(Recipe(recipe.model, recipe.device, recipe.workload, recipe.execution))
    beside_bytes = engine.budget.held_bytes["what techniques keep beside it"]
    assert engine.pool.nbytes + beside_bytes == decode.kv_bytes
    assert engine.pool.nbytes < 0.6 * dense.phases["decode"].kv_bytes
    run_all(engine, requests())
    assert engine.idle


def test_a_request_waits_while_the_free_blocks_lie_in_pieces(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is let in once those that write have ended; no step fails for its sake."""
    engine = engine_for(model_folder("llama"), 3)
    first, second, third = requests()
    untouched, refusals = engine.cache.open, 0

    def picky(tokens: int) -> Sequence:
        nonlocal refusals
        if engine._writing:
            refusals += 1
            raise BudgetExceeded("in pieces")
        return untouched(tokens)

    monkeypatch.setattr(engine.cache, "open", picky)
    run_all(engine, [first, second, third])
    assert refusals
    assert [len(request.output_ids) for request in (first, second, third)] == [NEW] * 3
