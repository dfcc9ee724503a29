"""One hard cap, two runs: plain transformers and ullage on the same long text."""

import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ullage.errors import UllageError
from ullage.measure.cage import Cage, CageReport
from ullage.measure.plain import NEW_TOKENS
from ullage.planner import build_plan, default_execution, fit_run
from ullage.planner.search import Freedom
from ullage.specs.device import Device
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan, Recipe
from ullage.specs.workload import Execution, Workload

ANSWER_TOKENS = 64
STEP_TOKENS = 512  # how much longer each of plain's prompts is than the one before
QUESTION = "\n\nIn one sentence, the text above explains that"


@dataclass(frozen=True)
class Capped:
    """One process under the cap: what was planned and what the kernel saw.

    `tokens` is the longest prompt that was read; `answer` what was written, for ullage.
    """

    plan: Plan
    report: CageReport
    exit_code: int
    tokens: int
    answer: str = ""


@dataclass(frozen=True)
class DemoText:
    """The demo's text as ids, cut to what the model can read with the question and the answer."""

    ids: list[int]
    prompt: str


def read_text(folder: Path, model: ModelSpec) -> DemoText:
    """Python's own documentation of its language, as long a part as the model's context holds."""
    from ullage.runtime.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = sys.maxsize  # the text is longer than the context, and is cut here
    ids = tokenizer("\n\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    room = model.max_context_tokens - ANSWER_TOKENS - 2 * len(tokenizer(QUESTION)["input_ids"])
    return DemoText(ids, tokenizer.decode(ids[:room]) + QUESTION)


def plain_plan(model: ModelSpec, device: Device, cap_bytes: int, tokens: int) -> Plan:
    """What plain transformers needs to read `tokens` in one pass, in fp32."""
    execution = Execution(engine="transformers", dtype="fp32", kv_dtype="fp32", prefill_chunk=0)
    work = Workload(tokens, NEW_TOKENS)
    return build_plan(Recipe(model, device, work, execution), cap_bytes)


def ullage_plan(model: ModelSpec, device: Device, cap_bytes: int) -> Plan:
    """What `ullage run` will choose under the cap for a prompt that fills the context."""
    work = Workload(model.max_context_tokens - ANSWER_TOKENS, ANSWER_TOKENS)
    recipe = Recipe(model, device, work, default_execution(device))
    return build_plan(fit_run(recipe, cap_bytes, Freedom()).recipe, cap_bytes)


def run_plain(plan: Plan, folder: Path, text: DemoText, on_length: Callable[[int], None]) -> Capped:
    """Plain transformers under the plan's budget as a cap, on prompts that grow until it dies or
    has read as many tokens as ullage will."""
    top = plan.recipe.workload.prompt_tokens
    lengths = [*range(STEP_TOKENS, top, STEP_TOKENS), top]
    with tempfile.TemporaryDirectory() as scratch, Cage(plan.budget_bytes) as cage:
        ids = Path(scratch) / "ids.json"
        ids.write_text(json.dumps(text.ids[:top]))
        process = cage.popen(
            [sys.executable, "-m", "ullage.measure.plain", str(folder), str(ids),
             *(str(length) for length in lengths)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        survived = 0
        for line in process.stdout or ():
            survived = json.loads(line)["tokens"]
            on_length(survived)
        exit_code = process.wait()
    return Capped(plan, cage.report(), exit_code, survived)


def run_ullage(plan: Plan, folder: Path, text: DemoText, cap: str) -> Capped:
    """`ullage run` under the same cap, told of it by --memory.

    Raises:
        UllageError: it failed.
    """
    with tempfile.TemporaryDirectory() as scratch, Cage(plan.budget_bytes) as cage:
        prompt = Path(scratch) / "prompt.txt"
        prompt.write_text(text.prompt, encoding="utf-8")
        process = cage.popen(
            [sys.executable, "-m", "ullage", "run", str(folder), "--prompt-file", str(prompt),
             "--memory", cap, "--max-new-tokens", str(ANSWER_TOKENS)],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        answer, _ = process.communicate()
    if process.returncode not in (0, -9, 137):
        raise UllageError(f"ullage run ended with exit code {process.returncode}.")
    tokens = plan.recipe.workload.prompt_tokens if process.returncode == 0 else 0
    return Capped(plan, cage.report(), process.returncode, tokens, answer.strip())
