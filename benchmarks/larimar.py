"""Facts of CounterFact, written all at once and read one by one: edits, paraphrases, neighbours.

    python benchmarks/larimar.py --data DIR [--facts 1000] [--set edit|train] [--strange]
        [--adapter NAME|FILE] [--only WAY]

DIR/facts/counterfact-SET.json is a list of records; one that contradicts a fact before it is left
out. The new answers are written to a memory with `larimar`'s readout of KV entries, and to one with
its trained readout. Then, of each fact's own prompt and of its rephrase, neither stripped:

    likelier   P[new answer] > P[true answer], as the paper counts
    exact      the likeliest text begins with the new answer
    whole      and no letter or digit follows it

and of its neighbour, of another subject:

    own        what is generated is what the base model generates, 8 tokens of it
    likelier   P[true answer] > P[new answer], as the paper counts

Beside the memories: the base model, and the fact put in front of the prompt. That has the same
gate, which is shown a prompt alone and decides among all facts. Percent, with the standard error;
bytes that are kept of a fact; milliseconds that a write takes, of which the model is the most.
`--strange` makes each new answer another fact's subject, which no relation gives and which mostly
is several rare tokens.
"""

import math
import time
from collections.abc import Callable
from statistics import mean, median

from rich.progress import track

from counterfact import ALL_BYTES, Reader, Record, adapter_of, fact_of, opened, parser, percent
from ullage.techniques.larimar.facts import FactMemory

WAYS = ("prompt", "kv", "latent")


def main() -> None:
    """Write all facts, ask about each, and print a line a way to ask."""
    asking = parser(__doc__, facts=1000)
    asking.add_argument("--only", choices=WAYS, action="append", help="all by default")
    asking.add_argument("--strange", action="store_true", help="answers that no relation gives")
    given = asking.parse_args()
    model, tokenizer, records = opened(given)
    if given.strange:
        records = strange(records)
    known = FactMemory(model, tokenizer)  # by whose gate all ways go
    known.ledger.add(map(fact_of, records), known.who)
    readers = {"base model": Reader(model, tokenizer)}
    for way in given.only or WAYS:
        if way == "prompt":
            readers["fact in the prompt"] = Reader(model, tokenizer, before=fact_before(known))
            continue
        adapter = adapter_of(given) if way == "latent" else None
        memory = FactMemory(model, tokenizer, held_bytes=ALL_BYTES, adapter=adapter)
        write(way, memory, records)
        readers[f"larimar, {way}"] = Reader(model, tokenizer, attached=memory.attached)
    for record in track(records, "asking"):
        ask(record, readers, known)
    for name, reader in readers.items():
        print(f"{name}: " + ", ".join(f"{what} {percent(n)}" for what, n in reader.counts.items()))
    print(f"n = {len(records):,} facts of counterfact-{given.set}.json, {given.model}")


def strange(records: list[Record]) -> list[Record]:
    """Each with the next one's subject for its answer."""
    others = [*records[1:], records[0]]
    return [
        {**record, "target_new": other["subject"]}
        for record, other in zip(records, others, strict=True)
    ]


def fact_before(known: FactMemory) -> Callable[[str], str]:
    """The text of the fact that a prompt is about."""

    def before(prompt: str) -> str:
        number = known.scope(prompt)
        return "" if number is None else f"{known.facts[number].text}.\n"

    return before


def write(name: str, memory: FactMemory, records: list[Record]) -> None:
    """Write the new answers; print what that takes."""
    times_s, sizes_bytes = [], []
    for record in track(records, "writing"):
        start_s, before_bytes = time.perf_counter(), memory.nbytes
        memory.write(
            subject=record["subject"], prompt=record["prompt"], answer=record["target_new"]
        )
        times_s.append(time.perf_counter() - start_s)
        sizes_bytes.append(memory.nbytes - before_bytes)
    print(
        f"{name}: a write: {1000 * median(times_s):.0f} ms, of the last hundred "
        f"{1000 * median(times_s[-100:]):.0f}, the slowest {1000 * max(times_s):.0f}; "
        f"a fact: {mean(sizes_bytes):,.0f} bytes ± {spread(sizes_bytes):,.0f}"
    )


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
            reader.count(f"{kind} whole", found.whole)
    own = base.answered(neighbour, record["locality_ground_truth"], new)
    in_scope = memory.scope(neighbour) is not None
    for reader in readers.values():
        same = reader is base or not in_scope
        reader.count("neighbour own", same or reader.text(neighbour) == base.text(neighbour))
        found = own if same else reader.answered(neighbour, record["locality_ground_truth"], new)
        reader.count("neighbour likelier", found.likelier)


def spread(numbers: list[int]) -> float:
    """The standard error of their mean."""
    about = mean(numbers)
    squares = sum((number - about) ** 2 for number in numbers)
    return math.sqrt(squares / max(1, len(numbers) - 1) / len(numbers))


if __name__ == "__main__":
    main()
