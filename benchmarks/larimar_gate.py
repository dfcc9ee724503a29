"""Whether the gate lets the right prompts through, with many facts of CounterFact at once.

    python benchmarks/larimar_gate.py --data DIR [--facts 1000] [--set edit|train]

DIR/facts/counterfact-SET.json is a list of records. A fact that contradicts one before it is left
out. Each fact's prompt and its rephrase should find that fact, its neighbour's prompt none; though
some neighbours are among the subjects of other facts. "another question" is the prompt of another
fact with this one's subject in it: without training the gate cannot tell that one. Prints percent,
with the standard error, and microseconds a prompt.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.gate import Gate

Record = dict[str, str]


def main() -> None:
    """Ask, and print a line a kind of prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--set", choices=["edit", "train"], default="edit")
    given = parser.parse_args()
    file = given.data / "facts" / f"counterfact-{given.set}.json"
    records = _standing(json.loads(file.read_text(encoding="utf-8")), given.facts)
    gate = Gate({number: fact for number, (_, fact) in enumerate(records)})
    random.seed(0)
    others = random.sample(records, len(records))
    prompts = {
        "prompt": [record["prompt"] for record, _ in records],
        "rephrase": [record["rephrase_prompt"] for record, _ in records],
        "neighbour": [record["locality_prompt"] for record, _ in records],
        "another question": [
            other["prompt"].replace(other["subject"], record["subject"])
            for (record, _), (other, _) in zip(records, others, strict=True)
        ],
    }
    for kind, asked in prompts.items():
        start_s = time.perf_counter()
        found = [gate.scope(prompt) for prompt in asked]
        each_s = (time.perf_counter() - start_s) / len(asked)
        own = sum(number == at for at, number in enumerate(found))
        none = found.count(None)
        shares = {"its fact": own, "another fact": len(found) - own - none, "none": none}
        said = ", ".join(f"{what} {_percent(n, len(found))}" for what, n in shares.items())
        print(f"{kind}: {said}; n = {len(found):,}, {each_s * 1e6:.0f} us each")


def _standing(records: list[Record], most: int) -> list[tuple[Record, Fact]]:
    """The first `most` of `records` that do not contradict each other."""
    standing: dict[str, tuple[Record, Fact]] = {}
    for record in records:
        fact = Fact.make(
            prompt=record["prompt"], answer=record["target_new"], subject=record["subject"]
        )
        standing.setdefault(fact.asks, (record, fact))
    return list(standing.values())[:most]


def _percent(count: int, total: int) -> str:
    share = count / total
    return f"{share:.1%} ±{math.sqrt(share * (1 - share) / total):.1%}"


if __name__ == "__main__":
    main()
