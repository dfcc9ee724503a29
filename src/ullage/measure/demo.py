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
from ullage.specs.whole import write_whole
from ullage.specs.workload import Execution, Workload

ANSWER_TOKENS = 64
STEP_TOKENS = 512  # how much longer each of plain's prompts is than the one before
_REFUSED = ("allocate memory", "MemoryError", "bad_alloc")  # how CPU allocators say no
QUESTION = "\n\nIn one sentence, the text above explains that"


@dataclass(frozen=True)
class Capped:
    """One process under the cap: what was planned and what the kernel saw.

    `read_tokens` is the longest prompt that was read, `answer` what ullage wrote, and `error` the
    last line that plain transformers left on stderr.
    """

    plan: Plan
    report: CageReport
    exit_code: int
    read_tokens: int
    answer: str = ""
    error: str = ""

    @property
    def out_of_memory(self) -> bool:
        """Whether the cap ended it: the kernel killed it, or refused it an allocation."""
        if self.report.mechanism == "RLIMIT_DATA":  # which sees that it failed, and not of what
            return self.exit_code != 0 and any(sign in self.error for sign in _REFUSED)
        return self.report.out_of_memory


@dataclass(frozen=True)
class DemoText:
    """The demo's text as ids, cut to what the model can read with the question and the answer.

    `prompt_tokens` counts the prompt as it is read: cut text is not always split at the cut again.
    """

    ids: list[int]
    prompt: str
    prompt_tokens: int


def read_text(folder: Path, model: ModelSpec) -> DemoText:
    """Python's own documentation of its language, as long a part as the model's context holds."""
    from ullage.runtime.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = sys.maxsize  # the text is longer than the context, and is cut here
    ids = tokenizer("\n\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    room = model.max_context_tokens - ANSWER_TOKENS - 2 * len(tokenizer(QUESTION)["input_ids"])
    prompt = tokenizer.decode(ids[:room]) + QUESTION
    return DemoText(ids, prompt, len(tokenizer(prompt)["input_ids"]))


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
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        Cage(plan.budget_bytes) as cage,
    ):
        ids = Path(scratch) / "ids.json"
        write_whole(ids, json.dumps(text.ids[:top]).encode())
        process = cage.popen(
            [sys.executable, "-m", "ullage.measure.plain", str(folder), str(ids),
             *(str(length) for length in lengths)],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        survived = 0
        for line in process.stdout or ():
            survived = json.loads(line)["tokens"]
            on_length(survived)
        exit_code = process.wait()
        errors.seek(0)
        error = (errors.read().strip().splitlines() or [""])[-1]
    return Capped(plan, cage.report(), exit_code, survived, error=error)


def run_ullage(plan: Plan, folder: Path, text: DemoText, cap: str) -> Capped:
    """`ullage run` under the same cap, told of it by --memory.

    Raises:
        UllageError: it failed.
    """
    with tempfile.TemporaryDirectory() as scratch, Cage(plan.budget_bytes) as cage:
        prompt = Path(scratch) / "prompt.txt"
        write_whole(prompt, text.prompt.encode())
        process = cage.popen(
            [sys.executable, "-m", "ullage", "run", str(folder), "--prompt-file", str(prompt),
             "--device", plan.recipe.device.name, "--memory", cap,
             "--max-new-tokens", str(ANSWER_TOKENS)],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        answer, _ = process.communicate()
    done = process.returncode == 0
    if not done and not cage.report().out_of_memory:
        raise UllageError(f"ullage run ended with exit code {process.returncode}.")
    tokens = text.prompt_tokens if done else 0
    return Capped(plan, cage.report(), process.returncode, tokens, answer.strip())
