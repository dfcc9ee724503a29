"""What the benchmarks of facts have in common: CounterFact's records, and how a model is asked."""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from ullage import resolve
from ullage.kv.cache import cache_argument
from ullage.runtime.checkpoint import weights_folder
from ullage.techniques.larimar.adapter import ADAPTERS, Adapter
from ullage.techniques.larimar.fact import Fact

Record = dict[str, str]
T = TypeVar("T")
TOKENS = 8  # of a neighbour's text
ALL_BYTES = 1 << 40  # to hold facts in: nothing is made twice


class Answered(NamedTuple):
    """Of one prompt."""

    likelier: bool  # the first of two answers than the second
    exact: bool  # the first is what is generated
    whole: bool  # and the word ends there


@dataclass
class Reader:
    """One way to ask the model."""

    model: Any
    tokenizer: Any
    attached: Callable[[], AbstractContextManager[Any]] = nullcontext
    before: Callable[[str], str] = lambda prompt: ""
    counts: dict[str, list[bool]] = field(default_factory=dict)

    def count(self, what: str, good: bool) -> None:
        """One more of a kind."""
        self.counts.setdefault(what, []).append(good)

    @torch.inference_mode()
    def answered(self, prompt: str, first: str, second: str) -> Answered:
        """Two answers behind one prompt. The prompt is read by itself: the gate sees no answer."""
        ids = self.ids(prompt)
        answers = [self.ids(f" {answer}", begins=False) for answer in (first, second)]
        longest = max(map(len, answers))
        padded = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
        with self.attached():
            read = self.model(torch.tensor([ids, ids]), use_cache=True)
            steps = [read.logits[:, -1:]]
            # As they are generated: a token at a time, and one behind the first answer.
            for at in range(max(longest - 1, len(answers[0]))):
                going_on = cache_argument(self.model, read.past_key_values)
                steps.append(self.model(padded[:, at : at + 1], **going_on).logits)
        logits = torch.cat(steps, dim=1).log_softmax(-1)
        chances = [
            sum(logits[row, at, token].item() for at, token in enumerate(answer))
            for row, answer in enumerate(answers)
        ]
        *greedy, behind = logits[0, : len(answers[0]) + 1].argmax(-1).tolist()
        exact = greedy == answers[0]
        whole = exact and not re.match(r"\w", self.tokenizer.decode(behind))
        return Answered(chances[0] > chances[1], exact, whole)

    @torch.inference_mode()
    def text(self, prompt: str) -> list[int]:
        """What is generated."""
        ids = torch.tensor([self.ids(prompt)])
        with self.attached():
            text = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        return list(text[0, ids.shape[1] :].tolist())

    def ids(self, text: str, begins: bool = True) -> list[int]:
        """The token ids of a prompt, or of what follows one."""
        whole = self.before(text) + text if begins else text
        return list(self.tokenizer(whole, add_special_tokens=begins)["input_ids"])


def parser(doc: str | None, facts: int) -> argparse.ArgumentParser:
    """What all of them are asked; `facts` unless said."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=facts)
    parser.add_argument("--set", choices=["edit", "train"], default="edit")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--adapter", default="smollm2-135m", help="of larimar's trained readout; '' for readout=kv"
    )
    parser.add_argument("--threads", type=int, default=0)
    return parser


def adapter_of(given: argparse.Namespace) -> Adapter | None:
    """That of `--adapter`."""
    return ADAPTERS.load(given.adapter) if given.adapter else None


def opened(given: argparse.Namespace) -> tuple[Any, Any, list[Record]]:
    """Model, in fp32, tokenizer and records."""
    if given.threads:
        torch.set_num_threads(given.threads)
    folder = weights_folder(resolve(given.model))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    file = given.data / "facts" / f"counterfact-{given.set}.json"
    records = standing(json.loads(file.read_text(encoding="utf-8")), given.facts)
    return model, AutoTokenizer.from_pretrained(folder), list(records)


def standing(records: list[Record], most: int) -> Iterator[Record]:
    """The first `most` of `records` that do not contradict each other."""
    asked = set[str]()
    for record in records:
        fact = fact_of(record)
        if fact.asks not in asked and len(asked) < most:
            asked.add(fact.asks)
            yield record


def fact_of(record: Record) -> Fact:
    """What a record's edit says."""
    return Fact.make(None, record["subject"], record["prompt"], record["target_new"])


def percent(good: list[bool]) -> str:
    """The share, with its standard error; a dash where nothing was asked."""
    if not good:
        return "–"
    share = sum(good) / len(good)
    return f"{share:.1%} ±{math.sqrt(share * (1 - share) / len(good)):.1%}"


def shown(items: Sequence[T], what: str) -> Iterator[T]:
    """With a bar while they last, where it is in nobody's table."""
    yield from track(items, what, transient=True, console=Console(stderr=True))
