"""Facts of CounterFact, written all at once and read one by one: edits, paraphrases, neighbours.

    python benchmarks/larimar.py --data DIR [--facts 1000] [--set edit|train]

DIR/facts/counterfact-SET.json is a list of records; one that contradicts a fact before it is left
out. The new answers are written to a memory with `larimar`'s readout of KV entries. Then, of each
fact's own prompt and of its rephrase, neither stripped:

    likelier   P[new answer] > P[true answer], as the paper counts
    exact      the likeliest text begins with the new answer

and of its neighbour, of another subject:

    own        what is generated is what the base model generates, 8 tokens of it
    likelier   P[true answer] > P[new answer], as the paper counts

Beside the memory: the base model, and the fact put in front of the prompt. That has the same gate,
which is shown a prompt alone and decides among all facts. Percent, with the standard error; bytes
of a fact's entries; milliseconds that a write takes, of which the model is the most.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from ullage import resolve
from ullage.kv.cache import cache_argument
from ullage.runtime.checkpoint import weights_folder
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.facts import FactMemory

Record = dict[str, str]
TOKENS = 8  # of a neighbour's text


class Answered(NamedTuple):
    """Of one prompt."""

    likelier: bool  # the first of two answers than the second
    exact: bool  # the first is what is generated


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
        ids = self._ids(prompt)
        answers = [self._ids(f" {answer}", begins=False) for answer in (first, second)]
        longest = max(map(len, answers))
        padded = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
        with self.attached():
            read = self.model(torch.tensor([ids, ids]), use_cache=True)
            steps = [read.logits[:, -1:]]
            for at in range(longest - 1):  # as they are generated: a token at a time
                going_on = cache_argument(self.model, read.past_key_values)
                steps.append(self.model(padded[:, at : at + 1], **going_on).logits)
        logits = torch.cat(steps, dim=1).log_softmax(-1)
        chances = [
            sum(logits[row, at, token].item() for at, token in enumerate(answer))
            for row, answer in enumerate(answers)
        ]
        greedy = logits[0, : len(answers[0])].argmax(-1).tolist()
        return Answered(chances[0] > chances[1], greedy == answers[0])

    @torch.inference_mode()
    def text(self, prompt: str) -> list[int]:
        """What is generated."""
        ids = torch.tensor([self._ids(prompt)])
        with self.attached():
            text = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        return list(text[0, ids.shape[1] :].tolist())

    def _ids(self, text: str, begins: bool = True) -> list[int]:
        whole = self.before(text) + text if begins else text
        return list(self.tokenizer(whole, add_special_tokens=begins)["input_ids"])


def main() -> None:
    """Write all facts, ask about each, and print a line a way to ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--set", choices=["edit", "train"], default="edit")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    folder = weights_folder(resolve(given.model))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = given.data / "facts" / f"counterfact-{given.set}.json"
    records = list(standing(json.loads(file.read_text(encoding="utf-8")), given.facts))
    memory = FactMemory(model, tokenizer)
    write(memory, records)
    readers = readers_of(model, tokenizer, memory)
    for record in track(records, "asking"):
        ask(record, readers, memory)
    for name, reader in readers.items():
        print(f"{name}: " + ", ".join(f"{what} {percent(n)}" for what, n in reader.counts.items()))
    print(f"n = {len(records):,} facts of {file.name}, {given.model}")


def standing(records: list[Record], most: int) -> Iterator[Record]:
    """The first `most` of `records` that do not contradict each other."""
    asked = set[str]()
    for record in records:
        fact = Fact.make(None, record["subject"], record["prompt"], record["target_new"])
        if fact.asks not in asked and len(asked) < most:
            asked.add(fact.asks)
            yield record


def write(memory: FactMemory, records: list[Record]) -> None:
    """Write the new answers; print what that takes."""
    times_s, sizes_bytes = [], []
    for record in track(records, "writing"):
        start_s = time.perf_counter()
        number = memory.write(
            subject=record["subject"], prompt=record["prompt"], answer=record["target_new"]
        )
        times_s.append(time.perf_counter() - start_s)
        sizes_bytes.append(memory.entries(number).nbytes)
    print(
        f"a write: {1000 * median(times_s):.0f} ms, of the last hundred "
        f"{1000 * median(times_s[-100:]):.0f}, the slowest {1000 * max(times_s):.0f}; "
        f"a fact: {mean(sizes_bytes):,.0f} bytes in fp32 ± {spread(sizes_bytes):,.0f}"
    )


def readers_of(model: Any, tokenizer: Any, memory: FactMemory) -> dict[str, Reader]:
    """The ways to ask."""

    def fact_before(prompt: str) -> str:
        number = memory.scope(prompt)
        return "" if number is None else f"{memory.facts[number].text}.\n"

    return {
        "base model": Reader(model, tokenizer),
        "fact in the prompt": Reader(model, tokenizer, before=fact_before),
        "larimar, kv": Reader(model, tokenizer, attached=memory.attached),
    }


def ask(record: Record, readers: dict[str, Reader], memory: FactMemory) -> None:
    """About one fact, in each way. Where the gate finds no fact, all ways are the base model's: its
    answers are taken for theirs."""
    new, true, neighbour = record["target_new"], record["ground_truth"], record["locality_prompt"]
    base = readers["base model"]
    for kind, prompt in (("prompt", record["prompt"]), ("rephrase", record["rephrase_prompt"])):
        own = base.answered(prompt, new, true)
        for reader in readers.values():
            same = reader is base or memory.scope(prompt) is None
            found = own if same else reader.answered(prompt, new, true)
            reader.count(f"{kind} likelier", found.likelier)
            reader.count(f"{kind} exact", found.exact)
    own = base.answered(neighbour, record["locality_ground_truth"], new)
    in_scope = memory.scope(neighbour) is not None
    for reader in readers.values():
        same = reader is base or not in_scope
        reader.count("neighbour own", same or reader.text(neighbour) == base.text(neighbour))
        found = own if same else reader.answered(neighbour, record["locality_ground_truth"], new)
        reader.count("neighbour likelier", found.likelier)


def percent(good: list[bool]) -> str:
    """The share, with its standard error."""
    share = sum(good) / len(good)
    return f"{share:.1%} ±{math.sqrt(share * (1 - share) / len(good)):.1%}"


def spread(numbers: list[int]) -> float:
    """The standard error of their mean."""
    about = mean(numbers)
    squares = sum((number - about) ** 2 for number in numbers)
    return math.sqrt(squares / max(1, len(numbers) - 1) / len(numbers))


if __name__ == "__main__":
    main()
