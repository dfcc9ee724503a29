"""The engine: the tokens are transformers' own, and every block comes back, whatever happens."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ullage import Device, Execution, Recipe, Workload, build_plan, resolve
from ullage.errors import BudgetExceeded, DoesNotFit, InputError, PromptError, UllageError
from ullage.runtime.engine import Engine, Request
from ullage.runtime.load import LoadedModel, load_model, load_tokenizer
from ullage.specs.families import RUNNING
from ullage.units import GIB, MIB

MakeEngine = Callable[..., Engine]
PROMPT = list(range(6, 26))
OTHERS = [PROMPT[:3], [40, 7, 40], PROMPT[::-1], [63], PROMPT[5:17]]


def recipe_for(
    folder: Path,
    chunk: int = 16,
    sequences: int = 1,
    kv_dtype: str = "fp32",
    work: tuple[int, int] = (20, 12),
) -> Recipe:
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype, prefill_chunk=chunk)
    device = Device("cpu", "cpu", 64 * GIB)
    return Recipe(resolve(str(folder)), device, Workload(*work, sequences), execution)


@pytest.fixture(scope="module")
def loaded(model_folder: Callable[..., Path]) -> Callable[..., LoadedModel]:
    """`loaded(family, dtype, rope)`: as `model_folder` saves it, in fp32."""

    @functools.cache
    def load(*saved: str) -> LoadedModel:
        folder = model_folder(*saved)
        plan = build_plan(recipe_for(folder))
        return load_model(plan, folder, load_tokenizer(folder))

    return load


@pytest.fixture
def engine(model_folder: Callable[..., Path], loaded: Callable[..., LoadedModel]) -> MakeEngine:
    """`engine(family, dtype, rope, chunk=, sequences=, kv_dtype=, work=)`"""

    def make(*saved: str, **options: Any) -> Engine:
        saved = saved or ("llama",)
        plan = build_plan(recipe_for(model_folder(*saved), **options))
        return Engine(loaded(*saved).without_end(), plan)

    return make


def run_all(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """Submit all, step until idle, and hold the engine to its limits on the way."""
    for request in requests:
        engine.submit(request)
    for _ in range(1000):
        if engine.idle:
            break
        engine.step()
        engine.cache.pool.check_integrity()
        assert len(engine._writing) <= engine.plan.recipe.workload.sequences
    assert all(request.finished for request in requests)
    assert_all_free(engine)
    return [request.output_ids for request in requests]


def assert_all_free(engine: Engine) -> None:
    assert engine.idle
    assert engine.cache.nbytes() == 0
    engine.cache.pool.check_integrity()


def transformers_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """Greedy, in fp32, to the full length."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    no_end = [1000]  # no token of the vocabulary
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=no_end,
    )
    return list(output[0, len(prompt) :].tolist())


def rope(kind: str, **parameters: Any) -> str:
    """As `model_folder` takes it."""
    return json.dumps({"rope_type": kind, "rope_theta": 10_000.0, **parameters})


SHORT = {"original_max_position_embeddings": 16}  # half of the prompt and its answer
SAVED = [
    *((family, dtype) for family in RUNNING for dtype in ("float32", "bfloat16")),
    ("llama", "float32", rope("linear", factor=4.0)),
    ("llama", "float32", rope("dynamic", factor=4.0)),
    ("llama", "float32", rope("yarn", factor=4.0, **SHORT)),
    (
        "llama",
        "float32",
        rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **SHORT),
    ),
    (
        "phi3",
        "float32",
        rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0, 3.0, 4.0, 5.0], **SHORT),
    ),
]


@pytest.mark.parametrize("saved", SAVED, ids=lambda saved: "-".join(saved)[:40])
def test_greedy_tokens_are_transformers_own_for_every_chunk_size(
    saved: tuple[str, ...], model_folder: Callable[..., Path], engine: MakeEngine
) -> None:
    expected = transformers_tokens(model_folder(*saved), PROMPT)
    assert len(set(expected)) > 3, "a model that repeats itself shows nothing"
    for chunk in (1, 3, 16, 20, 0):
        made = engine(*saved, chunk=chunk)
        assert list(made.generate(Request(PROMPT, 12))) == expected
        assert_all_free(made)


def test_a_sequence_longer_than_its_rotary_frequencies_are_for_is_refused(
    model_folder: Callable[..., Path],
) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    folder = model_folder("phi3", "float32", rope("longrope", **factors, **SHORT))
    plan = build_plan(recipe_for(folder, sequences=2, work=(10, 6)))
    made = Engine(load_model(plan, folder, load_tokenizer(folder)), plan)
    made.submit(Request(PROMPT[:10], 6))
    with pytest.raises(PromptError, match="rotary"):
        made.submit(Request(PROMPT[:10], 7))


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_over_a_rounded_cache_do_not_hang_on_the_chunk(
    family: str, kv_dtype: str, engine: MakeEngine
) -> None:
    tokens = [
        list(engine(family, chunk=chunk, kv_dtype=kv_dtype).generate(Request(PROMPT, 12)))
        for chunk in (1, 3, 16, 0)
    ]
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]
    assert len(tokens[0]) == 12


def test_generation_ends_with_the_end_token(
    model_folder: Callable[[str], Path],
    loaded: Callable[[str], LoadedModel],
    engine: MakeEngine,
) -> None:
    tokens = list(engine().generate(Request(PROMPT, 12)))
    end = tokens[4]
    ending = LoadedModel(loaded("llama").model, loaded("llama").tokenizer, frozenset([end]))
    made = Engine(ending, build_plan(recipe_for(model_folder("llama"))))
    assert list(made.generate(Request(PROMPT, 12))) == tokens[: tokens.index(end) + 1]
    assert_all_free(made)


@pytest.mark.parametrize("sequences", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_many_requests_are_their_single_runs(
    family: str, sequences: int, engine: MakeEngine
) -> None:
    def requests() -> list[Request]:
        return [Request(prompt, 3 + 2 * n) for n, prompt in enumerate(OTHERS)]

    singles = [list(engine(family).generate(request)) for request in requests()]
    together = run_all(engine(family, sequences=sequences, chunk=4), requests())
    assert together == singles
    assert [len(tokens) for tokens in together] == [3, 5, 7, 9, 11]


def test_requests_start_in_the_order_of_their_coming(engine: MakeEngine) -> None:
    made, finished = engine(sequences=2), []
    requests = [Request(PROMPT, 4) for _ in range(6)]
    for request in requests:
        made.submit(request)
    while not made.idle:
        made.step()
        finished += [r for r in requests if r.finished and r not in finished]
    assert [id(request) for request in finished] == [id(request) for request in requests]


def test_a_request_waits_until_there_is_room(engine: MakeEngine) -> None:
    """The first takes the whole pool of two sequences; the batch has a free seat, the pool none."""
    made = engine(sequences=2, work=(20, 12))
    first, second = Request(PROMPT, 44), Request(PROMPT, 12)
    made.submit(first)
    made.submit(second)
    for _ in range(10):
        made.step()
    assert first.output_ids
    assert made.cache.pool.free_blocks == 0
    assert not second.output_ids
    run_all(made, [])
    assert (len(first.output_ids), len(second.output_ids)) == (44, 12)


def test_generators_can_take_turns(engine: MakeEngine) -> None:
    single = list(engine().generate(Request(PROMPT, 8)))
    other = list(engine().generate(Request(PROMPT[::-1], 8)))
    made = engine(sequences=2)
    pairs = list(
        zip(
            made.generate(Request(PROMPT, 8)),
            made.generate(Request(PROMPT[::-1], 8)),
            strict=True,
        )
    )
    assert [list(tokens) for tokens in zip(*pairs, strict=True)] == [single, other]
    assert_all_free(made)


@pytest.mark.parametrize("taken", [1, 5])
def test_a_generator_closed_early_gives_its_blocks_back(engine: MakeEngine, taken: int) -> None:
    made = engine()
    tokens = made.generate(Request(PROMPT, 12))
    for _ in range(taken):
        next(tokens)
    assert made.cache.nbytes() > 0
    tokens.close()
    assert_all_free(made)
    assert len(list(made.generate(Request(PROMPT, 12)))) == 12


@pytest.mark.parametrize("at_token", [6, 12, 20])
def test_an_interrupt_while_reading_gives_the_blocks_back(
    engine: MakeEngine, at_token: int
) -> None:
    def interrupt(read_tokens: int, total_tokens: int) -> None:
        if read_tokens >= at_token:
            raise KeyboardInterrupt

    made = engine(chunk=3)
    with pytest.raises(KeyboardInterrupt):
        list(made.generate(Request(PROMPT, 12, on_prefill=interrupt)))
    assert_all_free(made)


@pytest.mark.parametrize("call", [1, 3, 9])
def test_a_crash_inside_the_model_gives_the_blocks_back(
    engine: MakeEngine, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(chunk=5)
    expected = list(made.generate(Request(PROMPT, 12)))
    layer, calls = made.loaded.model.model.layers[1].mlp, iter(range(1, 1000))
    forward = layer.forward

    def crash(*args: Any) -> Any:
        if next(calls) == call:
            raise MemoryError
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", crash)
        with pytest.raises(MemoryError):
            list(made.generate(Request(PROMPT, 12)))
    assert_all_free(made)
    assert list(made.generate(Request(PROMPT, 12))) == expected


def test_an_interrupted_batch_is_given_up_whole(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have the step's tokens and some have not: no text may go on from that."""
    made = engine(sequences=2)
    expected = list(made.generate(Request(PROMPT, 12)))
    layer, other = made.loaded.model.model.layers[1].mlp, made.generate(Request(PROMPT[::-1], 12))
    next(other)
    mine = made.generate(Request(PROMPT, 12))
    next(mine)

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(mine)
    assert_all_free(made)
    with pytest.raises(UllageError, match="interrupted"):
        list(other)
    assert list(made.generate(Request(PROMPT, 12))) == expected


def test_cancelling_one_leaves_the_others_as_they_were(engine: MakeEngine) -> None:
    expected = list(engine().generate(Request(PROMPT, 12)))
    made = engine(sequences=2, chunk=4)
    kept, writing, waiting = Request(PROMPT, 12), Request(PROMPT[:2], 12), Request(PROMPT[:2], 12)
    for request in (writing, kept, waiting):
        made.submit(request)
    for _ in range(3):
        made.step()
    assert writing.output_ids
    made.cancel(writing)
    made.cancel(waiting)
    made.cancel(waiting)  # again: nothing
    while not made.idle:
        made.step()
    assert kept.output_ids == expected
    assert_all_free(made)


def test_progress_of_reading_is_told(engine: MakeEngine) -> None:
    seen: list[tuple[int, int]] = []
    request = Request(PROMPT, 1, on_prefill=lambda *tokens: seen.append(tokens))
    assert len(list(engine(chunk=8).generate(request))) == 1
    assert seen == [(8, 20), (16, 20), (20, 20)]


def sampled(engine: Engine, seed: int, temperature: float = 1.0) -> list[int]:
    return list(engine.generate(Request(PROMPT, 12, temperature=temperature, seed=seed)))


def test_a_seed_draws_the_same_tokens_again(engine: MakeEngine) -> None:
    made = engine()
    first = sampled(made, 7, 5.0)
    assert sampled(made, 7, 5.0) == first
    assert sampled(engine(chunk=3), 7, 5.0) == first
    assert len({tuple(sampled(made, seed, 5.0)) for seed in range(5)}) == 5


def test_a_seeds_tokens_do_not_hang_on_the_company(engine: MakeEngine) -> None:
    alone = sampled(engine(), 7, 5.0)
    requests = [Request(PROMPT, 12, temperature=5.0, seed=seed) for seed in (1, 7, 3)]
    assert run_all(engine(sequences=3), requests)[1] == alone


def test_a_temperature_near_zero_is_greedy(engine: MakeEngine) -> None:
    made = engine()
    assert sampled(made, 7, 0.001) == sampled(made, 8, 0.0)


@pytest.mark.parametrize(("prompt", "new_tokens"), [([], 5), (PROMPT, 0), (PROMPT, -1)])
def test_an_empty_request_is_refused(prompt: list[int], new_tokens: int) -> None:
    with pytest.raises(PromptError):
        Request(prompt, new_tokens)


@pytest.mark.parametrize("temperature", [-1.0, math.nan])
def test_a_temperature_that_no_token_is_drawn_at_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        Request(PROMPT, 5, temperature=temperature)


def test_a_request_past_the_models_context_is_refused(engine: MakeEngine) -> None:
    made = engine(work=(250, 50))
    made.submit(Request([6] * 250, 6))  # 256 in all, the model's context
    with pytest.raises(PromptError, match="256"):
        made.submit(Request([6] * 250, 7))


def test_a_request_that_the_pool_can_never_hold_is_refused(engine: MakeEngine) -> None:
    made = engine(work=(20, 12))
    with pytest.raises(DoesNotFit) as refused:
        made.submit(Request(PROMPT, 13))
    assert made.idle
    assert refused.value.needed_bytes > made.cache.pool.nbytes


def test_a_budget_below_what_is_loaded_is_refused(
    model_folder: Callable[[str], Path], loaded: Callable[[str], LoadedModel]
) -> None:
    plan = build_plan(recipe_for(model_folder("llama")), 10 * MIB)
    with pytest.raises(BudgetExceeded, match="what is loaded"):
        Engine(loaded("llama"), plan)


def test_a_budget_without_room_for_the_cache_is_refused(
    model_folder: Callable[[str], Path],
    loaded: Callable[[str], LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = build_plan(recipe_for(model_folder("llama")), 500 * MIB)
    decode = plan.phases["decode"]
    room = 500 * MIB - plan.phases["prefill"].activation_bytes - decode.logits_bytes
    for held, fits in ((room - decode.kv_bytes, True), (room - decode.kv_bytes + 1, False)):
        monkeypatch.setattr("ullage.runtime.pool.held_bytes", lambda _, held=held: held)
        if fits:
            assert Engine(loaded("llama"), plan).budget.free_bytes == 0
        else:
            with pytest.raises(BudgetExceeded, match="KV pool"):
                Engine(loaded("llama"), plan)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_the_pool_is_what_was_planned(kv_dtype: str, engine: MakeEngine) -> None:
    made = engine("gemma2", sequences=3, kv_dtype=kv_dtype)
    assert made.cache.pool.nbytes == made.plan.phases["decode"].kv_bytes
