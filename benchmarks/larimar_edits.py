"""Facts over thousands of edits: what is kept, edited again, forgotten, and how long a write takes.

    python benchmarks/larimar_edits.py --data DIR [--facts 10000] [--asked 300] [--only PART]

All is of DIR/facts/counterfact-SET.json; a record that contradicts one before it is left out. An
answer counts as in larimar.py: likelier than another, exact where it is the likeliest text. Shares
are percent, with the standard error. The parts:

retention   Facts are written one after the other, an event each; entries are made when they are
            asked for. After 1, 10, 100, ... edits a sample of those written so far is asked: how
            many are likelier than the true answer, how many exact; and of those that were so when
            they stood alone, how many still are. An answer depends on the prompt and on the fact
            that the gate chooses for it, whose entries are made of its own text and nothing else.
            So where both gates, among all facts and of a memory of this one, choose it, it is asked
            once; elsewhere a memory of this fact alone is asked too.
repeated    One fact's number is edited 1,000 times, by turns to answers of other records; the 1st,
            10th, 100th and 1,000th is its own new answer. Is it told, rather than the one
            before? Are its logits to the bit those of a memory to which it was written once? And
            what is held, in MiB.
forgetting  Of 1,000 facts 200 are forgotten: are they told, more than by the base model? Are the
            logits behind their prompts those of the base model, to the bit? Where not, another
            fact is about the same subject. Of 200 others: are they told as before?
latency     Milliseconds of `FactMemory.write`, model and disk with it, of the same 50 facts: the
            first ones in a ledger, and behind all others.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from counterfact import (
    Answered,
    Reader,
    Record,
    adapter_of,
    fact_of,
    opened,
    parser,
    percent,
    shown,
)  # fmt: skip
from ullage.techniques.larimar.adapter import Adapter
from ullage.techniques.larimar.facts import FactMemory
from ullage.techniques.larimar.ledger import Who

WHO = Who("benchmark")
SEED = 0
TIMES = 1000  # that one fact is edited
REPEATED = 100  # facts that are
STANDING, FORGOTTEN = 1000, 200
WRITES = 50  # that are timed
Row = list[str]


class Bench(NamedTuple):
    """What each part works on."""

    model: Any
    tokenizer: Any
    records: list[Record]
    asked: int  # at most, after so many edits
    adapter: Adapter | None

    def empty(self, ledger: Path | None = None) -> FactMemory:
        """A memory of no facts."""
        return FactMemory(self.model, self.tokenizer, ledger, adapter=self.adapter)

    def memory(self, records: list[Record]) -> tuple[FactMemory, list[int]]:
        """One to which facts were written, an event each, and their numbers."""
        memory = self.empty()
        return memory, [added(memory, record) for record in records]

    def reader(self, memory: FactMemory | None = None) -> Reader:
        """How the model is asked, with a memory or as it is."""
        if memory is None:
            return Reader(self.model, self.tokenizer)
        return Reader(self.model, self.tokenizer, attached=memory.attached)

    @torch.inference_mode()
    def logits(self, prompt: str, memory: FactMemory | None = None) -> torch.Tensor:
        """[T, V] behind each token of a prompt."""
        reader = self.reader(memory)
        with reader.attached():
            found = self.model(torch.tensor([reader.ids(prompt)]), use_cache=True).logits[0]
        return torch.as_tensor(found)


def main() -> None:
    """Measure the parts, and print a table of each."""
    parts = {
        "retention": retention,
        "repeated": repeated,
        "forgetting": forgetting,
        "latency": latency,
    }
    asking = parser(__doc__, facts=10_000)
    asking.add_argument("--asked", type=int, default=300)
    asking.add_argument("--only", choices=parts, action="append")
    given = asking.parse_args()
    model, tokenizer, records = opened(given)
    bench = Bench(model, tokenizer, records, given.asked, adapter_of(given))
    for name in given.only or parts:
        table(name, parts[name](bench))
    print(f"\n{len(records):,} facts of counterfact-{given.set}.json, {given.model}, fp32")


def retention(bench: Bench) -> Iterator[Row]:
    """A line a number of edits."""
    yield ["edits", "n", "likelier", "exact", "own fact chosen", "likelier, kept", "exact, kept"]
    memory, numbers = bench.empty(), list[int]()
    for edits in steps(len(bench.records)):
        new = bench.records[len(numbers) : edits]
        numbers += [added(memory, record) for record in shown(new, f"writing {edits:,}")]
        sample = random.Random(SEED).sample(range(edits), min(bench.asked, edits))
        own, now, alone = list[bool](), list[Answered](), list[Answered]()
        for at in shown(sample, f"asking after {edits:,}"):
            record = bench.records[at]
            own.append(scope(memory, record) == numbers[at])
            now.append(told(bench.reader(memory), record))
            alone.append(told_alone(bench, record, now[-1], own[-1]))
        yield [
            f"{edits:,}", f"{len(sample)}", *shares(now), percent(own),
            *(percent(kept(now, alone, kind)) for kind in ("likelier", "exact")),
        ]  # fmt: skip


def told_alone(bench: Bench, record: Record, now: Answered, own: bool) -> Answered:
    """As a memory of this fact alone tells it: as `now`, where its `own` is chosen in both."""
    memory, (number,) = bench.memory([record])
    if own and scope(memory, record) == number:
        return now
    return told(bench.reader(memory), record)


def kept(now: list[Answered], alone: list[Answered], kind: str) -> list[bool]:
    """Whether those are still told that were when they stood alone."""
    pairs = zip(now, alone, strict=True)
    return [getattr(after, kind) for after, before in pairs if getattr(before, kind)]


def repeated(bench: Bench) -> Iterator[Row]:
    """A line a number of edits of one fact."""
    yield [
        "edits of it",
        "n",
        "likelier than the one before",
        "exact",
        "as if written once",
        "MiB held",
    ]
    lines: dict[int, list[tuple[Answered, bool, int]]] = {}
    for record in shown(bench.records[:REPEATED], "editing again and again"):
        once, _ = bench.memory([record])
        expected = bench.logits(record["prompt"], once)
        for edits, last, memory in edited(bench, record):
            found = bench.reader(memory).answered(record["prompt"], record["target_new"], last)
            same = torch.equal(bench.logits(record["prompt"], memory), expected)
            lines.setdefault(edits, []).append((found, same, memory.nbytes))
    for edits, line in lines.items():
        held_mib = mean(held_bytes for *_, held_bytes in line) / 2**20
        yield [
            f"{edits:,}", f"{len(line)}", *shares([answer for answer, *_ in line]),
            count([same for _, same, _ in line]), f"{held_mib:.2f}",
        ]  # fmt: skip


def edited(bench: Bench, record: Record) -> Iterator[tuple[int, str, FactMemory]]:
    """A memory after 1, 10, 100, ... edits of its one fact, and the answer before the last."""
    own, last = record["target_new"], record["ground_truth"]
    others = [other["target_new"] for other in bench.records]
    others = [other for other in dict.fromkeys(others) if other != own]
    memory, (number,) = bench.memory([{**record, "target_new": last}])
    asked = set(steps(TIMES))
    for edits in range(1, TIMES + 1):
        if edits in asked:
            memory.edit(number, answer=own)
            yield edits, last, memory
            last = own
            continue
        last = others[edits % len(others)]
        fact = memory.ledger.fact(number)
        memory.ledger.edit(number, fact.edited(answer=last), WHO, fact)
        memory.refresh()  # the gate's turn; entries are made at the steps that are asked


def forgetting(bench: Bench) -> Iterator[Row]:
    """A line a kind of facts and a time."""
    yield ["facts", "n", "likelier", "exact", "logits of the base model", "another fact chosen"]
    records = bench.records[:STANDING]
    memory, numbers = bench.memory(records)
    some = min(FORGOTTEN, len(records) // 2)
    chosen = random.Random(SEED).sample(range(len(records)), 2 * some)
    kinds = {"forgotten": chosen[:some], "retained": chosen[some:]}
    for when in ("before", "after"):
        for kind, places in kinds.items():
            asked = {numbers[at]: records[at] for at in places}
            yield [f"{kind}, {when}", *standing_line(bench, memory, asked)]
        if when == "before":
            for at in kinds["forgotten"]:
                memory.forget(numbers[at])
    base = [
        told(bench.reader(), records[at]) for at in shown(kinds["forgotten"], "asking the base")
    ]
    yield ["forgotten, base model", f"{some}", *shares(base), "", ""]


def standing_line(bench: Bench, memory: FactMemory, asked: dict[int, Record]) -> Row:
    """What a memory tells of facts, by their numbers."""
    answers, same, others = list[Answered](), list[bool](), list[bool]()
    for number, record in shown(list(asked.items()), "asking"):
        prompt = record["prompt"]
        answers.append(told(bench.reader(memory), record))
        same.append(torch.equal(bench.logits(prompt, memory), bench.logits(prompt)))
        others.append(scope(memory, record) not in (None, number))
    return [f"{len(asked)}", *shares(answers), count(same), count(others)]


def latency(bench: Bench) -> Iterator[Row]:
    """A line a number of facts before."""
    yield ["facts before", "n", "median ms", "95th percentile", "slowest"]
    some = min(WRITES, len(bench.records) // 2)
    before, timed = bench.records[:-some], bench.records[-some:]
    written_ms(bench, [], before[:1])  # a first pass is slower
    for held in ([], before):
        times_ms = written_ms(bench, held, timed)
        figures = (median(times_ms), quantiles(times_ms, n=20, method="inclusive")[-1])
        yield [f"{len(held):,}", f"{some}", *(f"{ms:.0f}" for ms in (*figures, max(times_ms)))]


def written_ms(bench: Bench, held: list[Record], timed: list[Record]) -> list[float]:
    """Of each write behind those that are held, in a ledger on disk."""
    times_ms = []
    with (
        TemporaryDirectory() as folder,
        bench.empty(Path(folder) / "facts.db") as memory,
    ):
        memory.ledger.add(map(fact_of, held), WHO)
        memory.refresh()
        for record in shown(timed, f"writing behind {len(held):,}"):
            start_s = time.perf_counter()
            memory.write(
                subject=record["subject"], prompt=record["prompt"], answer=record["target_new"]
            )
            times_ms.append(1000 * (time.perf_counter() - start_s))
    return times_ms


def added(memory: FactMemory, record: Record) -> int:
    """The number of a fact that is written, an event of its own, without its entries."""
    return memory.ledger.add([fact_of(record)], WHO).numbers[0]


def scope(memory: FactMemory, record: Record) -> int | None:
    """What the gate chooses, as it sees a prompt: by its token ids."""
    ids = memory.tokenizer(record["prompt"])["input_ids"]
    return memory.scope(memory.tokenizer.decode(ids, skip_special_tokens=True))


def told(reader: Reader, record: Record) -> Answered:
    """The new answer behind a fact's own prompt, beside the true one."""
    return reader.answered(record["prompt"], record["target_new"], record["ground_truth"])


def steps(most: int) -> list[int]:
    """1, 10, 100, ... and the last."""
    powers = [10**power for power in range(len(str(most)))]
    return sorted({*powers, most})


def shares(answers: list[Answered]) -> list[str]:
    """Likelier, and exact."""
    return [percent([a.likelier for a in answers]), percent([a.exact for a in answers])]


def count(good: list[bool]) -> str:
    """Of all."""
    return f"{sum(good)} of {len(good)}"


def table(name: str, lines: Iterator[Row]) -> None:
    """Print a table whose first line is its head, each line when it is there."""
    print(f"\n{name}")
    for at, line in enumerate(lines):
        print(f"| {' | '.join(line)} |", flush=True)
        if not at:
            print(f"|{'---|' * len(line)}")


if __name__ == "__main__":
    main()
