"""What the paper's memory, in each of its modes, reads back of facts that are kept as latents.

    python benchmarks/larimar_modes.py --data DIR [--facts 1000] [--asked 40] [--adapter NAME|FILE]

DIR/facts/counterfact-SET.json is a list of records; one that contradicts a fact before it is left
out. A fact's row is its latents, with zeros behind them up to as many entries as the longest has,
less the mean of all rows, which is added again to what is read. Its key is, in turn,

    hidden   the model's hidden state behind the fact's own prompt, at half depth, centred and
             scaled over all facts
    random   a random direction: keys that are as far apart as any

`gpm` and `rls` have 512 slots and a fixed random reference. Of 32, 128, 256, 512 and 1,000 facts:

    error      of the rows of all facts, each read by its own key, relative
    likelier, exact
               of a sample, behind each fact's own prompt, as larimar.py counts, when the model
               reads entries that are made of what the memory gives. No gate is asked; how many
               entries a fact has, and what is added to their scores, is known
    MiB        of what must be held to read: rows, or slots alone. In fp64, as all of it is
    ms         that a write takes behind the others, with the read after it, in which gpm writes
    forgotten, retained
               likelier and exact of the two halves of the sample, when half of all facts are
               forgotten; of the retained also the error, and how many are answered as before

"none" is the model without a memory, "alone" each fact's latents as they are. Shares are percent,
with the standard error.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

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
from larimar_edits import Row, shares, table
from ullage.kv.prefaced import prefaced
from ullage.techniques.larimar.latent import Latent, Latents
from ullage.techniques.larimar.memory import Gaussian, Memory, PseudoInverse, Recursive

FACTS = (32, 128, 256, 512, 1000)
SLOTS = 512
SEED = 0
TIMED = 5  # writes
FP64_BYTES = 8
HEAD = [
    "key", "facts", "mode", "error", "likelier", "exact", "MiB", "ms",
    "forgotten: likelier", "exact", "retained: error", "likelier", "exact", "as before",
]  # fmt: skip


class Bench:
    """Facts, their rows and keys, and how a model answers by a row."""

    def __init__(self, model: Any, tokenizer: Any, records: list[Record], latent: Latent) -> None:
        self._latent, self._records = latent, records
        self._model, self._reader = model, Reader(model, tokenizer)
        self._known: dict[tuple[int, bytes], Answered] = {}
        self._kept, states = list[Latents](), list[torch.Tensor]()
        for record in shown(records, "reading facts"):
            self._kept.append(self._latents(record))
            states.append(self._state(record))
        self.entries = max(len(kept.numbers) for kept in self._kept)
        rows = torch.stack([self._row(kept) for kept in self._kept])  # [N, entries * C], fp64
        # Centred keys hold no constant: of more facts than slots projections would lose the mean.
        self.mean = rows.mean(0)
        self.rows = rows - self.mean
        hidden = torch.stack(states).double()
        self.keys = {
            "hidden": (hidden - hidden.mean(0)) / hidden.std(0),
            "random": torch.nn.functional.normalize(drawn(*hidden.shape)),
        }

    @torch.inference_mode()
    def _latents(self, record: Record) -> Latents:
        kept = self._latent.make(fact_of(record))
        assert isinstance(kept, Latents)
        return kept

    @torch.inference_mode()
    def _state(self, record: Record) -> torch.Tensor:
        """[hidden]"""
        ids = torch.tensor([self._reader.ids(record["prompt"])])
        states = self._model.model(ids, output_hidden_states=True).hidden_states
        return torch.as_tensor(states[(len(states) - 1) // 2][0, -1])

    def _row(self, kept: Latents) -> torch.Tensor:
        count, width = kept.numbers.shape
        row = torch.zeros(self.entries, width, dtype=torch.float64)
        row[:count] = kept.numbers
        return row.flatten()

    def answer(self, fact: int, row: torch.Tensor | None) -> Answered:
        """To a fact's own prompt, behind the entries that a row is of. The same is asked once."""
        kept, record = self._kept[fact], self._records[fact]
        numbers = None
        if row is not None:
            limit = torch.finfo(torch.float16).max
            whole = (row + self.mean).clamp(-limit, limit).view(self.entries, -1)
            numbers = whole[: len(kept.numbers)].half()
        known = fact, b"" if numbers is None else numbers.numpy().tobytes()
        if known not in self._known:
            reader = Reader(self._model, self._reader.tokenizer)
            if numbers is not None:
                preface = self._latent.read(Latents(numbers, kept.bias, kept.preface))
                reader.attached = lambda: prefaced(self._model, lambda ids: preface, "larimar")
            self._known[known] = reader.answered(
                record["prompt"], record["target_new"], record["ground_truth"]
            )
        return self._known[known]


def main() -> None:
    """Print a line for each key, number of facts and mode."""
    asking = parser(__doc__, facts=FACTS[-1])
    asking.add_argument("--asked", type=int, default=40)
    given = asking.parse_args()
    adapter = adapter_of(given)
    if adapter is None:
        asking.error("rows are latents: name an --adapter")
    model, tokenizer, records = opened(given)
    bench = Bench(model, tokenizer, records, Latent(model, tokenizer, adapter))
    table("modes", lines(bench, given.asked))
    print(f"\n{len(records):,} facts of counterfact-{given.set}.json, {given.model}, fp32")
    print(f"a row: {bench.entries} entries, {bench.rows.shape[1]:,} numbers")
    print(f"n = {given.asked}, or all facts; half as many of forgotten and of retained")


def lines(bench: Bench, asked: int) -> Iterator[Row]:
    """The table's."""
    yield HEAD
    for key, keys in bench.keys.items():
        reference = drawn(SLOTS, keys.shape[1], seed=SEED + 1)
        modes: dict[str, Callable[[], Memory]] = {
            "gpm": partial(PseudoInverse, reference),
            "rls": partial(Recursive, reference),
            "gauss": Gaussian,
        }
        for facts in (facts for facts in FACTS if facts <= len(keys)):
            drawing = random.Random(SEED)
            sample = drawing.sample(range(facts), min(asked, facts))
            if key == "hidden":
                yield without(bench, facts, sample, "none", lambda fact: None)
                yield without(bench, facts, sample, "alone", lambda fact: bench.rows[fact])
            others = sorted(set(range(facts)) - set(sample))
            halves = sample[::2] + drawing.sample(others, len(others) // 2)
            for name, made in modes.items():
                held = measured(bench, keys[:facts], made(), sample, halves)
                yield [key, f"{facts:,}", name, *held]


def without(
    bench: Bench,
    facts: int,
    sample: list[int],
    name: str,
    row: Callable[[int], torch.Tensor | None],
) -> Row:
    """The line of no memory at all."""
    answers = [bench.answer(fact, row(fact)) for fact in sample]
    halves = [*shares(answers[::2]), "", *shares(answers[1::2]), ""]
    return ["", f"{facts:,}", name, "", *shares(answers), "", "", *halves]


def measured(
    bench: Bench, keys: torch.Tensor, memory: Memory, sample: list[int], forgotten: list[int]
) -> Row:
    """What a line says of a memory."""
    facts, rows = len(keys), bench.rows[: len(keys)]
    for fact in shown(range(facts), f"writing {facts:,}"):
        memory.write(fact, keys[fact], rows[fact])
    before = dict(zip(sample, answered(bench, memory, keys, sample), strict=True))
    error = off(memory.read(keys) + bench.mean, rows + bench.mean)
    width = keys.shape[1] + rows.shape[1]
    held = facts if isinstance(memory, Gaussian) else SLOTS
    held_mib = held * width * FP64_BYTES / 2**20
    write_ms = 1000 * median(timed(memory, keys, rows) for _ in range(TIMED))
    for fact in shown(forgotten, f"forgetting {len(forgotten):,}"):
        memory.forget(fact)
    gone, retained = sample[::2], sample[1::2]
    stay = sorted(memory.facts)
    left = off(memory.read(keys[stay]) + bench.mean, rows[stay] + bench.mean)
    after = answered(bench, memory, keys, retained)
    same = [now == before[fact] for fact, now in zip(retained, after, strict=True)]
    return [
        f"{error:.1e}", *shares(list(before.values())), f"{held_mib:.1f}", f"{write_ms:.1f}",
        *shares(answered(bench, memory, keys, gone)),
        f"{left:.1e}", *shares(after), percent(same),
    ]  # fmt: skip


def answered(
    bench: Bench, memory: Memory, keys: torch.Tensor, facts: Sequence[int]
) -> list[Answered]:
    """What the model says, by what is read by the keys of these facts."""
    rows = memory.read(keys[list(facts)])
    pairs = shown(list(zip(facts, rows, strict=True)), f"asking of {len(keys):,}")
    return [bench.answer(fact, row) for fact, row in pairs]


def timed(memory: Memory, keys: torch.Tensor, rows: torch.Tensor) -> float:
    """Seconds that one more write takes, and the read behind it; it is forgotten again."""
    more, key = len(keys), drawn(keys.shape[1], seed=SEED + 2)
    start_s = time.perf_counter()
    memory.write(more, key, rows[0])
    memory.read(key[None])
    took_s = time.perf_counter() - start_s
    memory.forget(more)
    return took_s


def off(read: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of all rows together."""
    return float((read - expected).norm() / expected.norm())


def drawn(*shape: int, seed: int = SEED) -> torch.Tensor:
    """Normal numbers, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


if __name__ == "__main__":
    main()
