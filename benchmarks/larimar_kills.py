"""Kill -9 processes while they write facts, and look whether what they acknowledged is there.

    python benchmarks/larimar_kills.py [--trials 1000] [--folder DIR]

A trial forks a process that adds facts, one by one and a dozen at a time, edits, forgets and rolls
back, and that says before each change what is acknowledged. It is killed at a random moment, also
while it begins the ledger. Then every event that was acknowledged is there, and of the change that
it was at all events or none, and the chain of hashes holds. A ledger is gone on with for 20 trials,
so that what a killed process left is taken over by the next.

Says how many trials failed, how many changes were whole on disk though the process was killed
before it could say so, and how many events were written. Exit code 1 if any trial failed.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from ullage.errors import LedgerError
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who

LONGEST_S = 0.06  # that a process lives
TRIALS_A_LEDGER = 20
TOGETHER = 12


@dataclass
class Tally:
    """What was seen over all trials."""

    failures: int = 0
    unacknowledged: int = 0  # changes that were whole on disk before they could be said
    unbegun: int = 0  # killed before there was a ledger
    events: int = 0  # that were written


def main() -> None:
    """Run the trials, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="On the disk to try. Default: a temporary one.")
    given = parser.parse_args()
    chosen, tally, start_s = random.Random(given.seed), Tally(), time.perf_counter()
    with TemporaryDirectory(dir=given.folder) as folder:
        for trial in range(given.trials):
            path = Path(folder) / f"{trial // TRIALS_A_LEDGER}.db"
            said = killed(path, trial, chosen.uniform(0, LONGEST_S))
            wrong = judged(path, trial, said, tally)
            if wrong:
                tally.failures += 1
                print(f"trial {trial}: {wrong}", file=sys.stderr)
    print(
        f"{given.trials:,} kills, {tally.failures} failed: {tally.events:,} events written, "
        f"{tally.unacknowledged} changes whole but not acknowledged yet, {tally.unbegun} killed "
        f"before a ledger began; {time.perf_counter() - start_s:.0f} s"
    )
    sys.exit(1 if tally.failures else 0)


def killed(path: Path, trial: int, lives_s: float) -> tuple[int, int] | None:
    """How many events a process had acknowledged when it was killed, and how many there would have
    been after the change that it was at; None if it had not begun."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(reads)
            for done, next_done in changes(path, trial):
                os.write(writes, b"%d %d\n" % (done, next_done))
        finally:
            os._exit(3)
    os.close(writes)
    time.sleep(lives_s)
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if not os.WIFSIGNALED(status):
        raise SystemExit(f"trial {trial}: the process ended by itself, by status {status}")
    with open(reads) as pipe:
        lines = pipe.read().splitlines()
    return tuple(map(int, lines[-1].split())) if lines else None  # type: ignore[return-value]


def changes(path: Path, trial: int) -> Iterator[tuple[int, int]]:
    """Change a ledger without end; before each change, how many events are acknowledged, and how
    many will be."""
    who, chosen = Who(f"trial {trial}"), random.Random(trial)
    with Ledger(path, create=True) as ledger:
        for step in count():
            head = ledger.head
            done = 0 if head is None else head.number
            facts = ledger.facts()
            act = chosen.random()
            if act < 0.4 or len(facts) < TOGETHER:
                names = [f"{trial}x{step}x{n}" for n in range(TOGETHER if act < 0.2 else 1)]
                yield done, done + len(names)
                ledger.add([Fact.make(f"The king of Land{name} is Bob") for name in names], who)
            elif act < 0.6:
                yield done, done + 1
                fact = Fact.make(f"The king of Isle{trial}x{step} is Ann")
                ledger.edit(chosen.choice(list(facts)), fact, who)
            elif act < 0.9:
                yield done, done + TOGETHER
                ledger.forget(chosen.sample(list(facts), TOGETHER), who)
            else:
                then = ledger.facts(max(0, done - 20))
                differ = sum(facts.get(n) != then.get(n) for n in facts.keys() | then.keys())
                yield done, done + differ
                ledger.rollback(max(0, done - 20), who)


def judged(path: Path, trial: int, said: tuple[int, int] | None, tally: Tally) -> str | None:
    """What is wrong with the ledger after a kill; None if nothing is."""
    try:
        with Ledger(path) as ledger:
            ledger.verify()
            events = list(ledger.events())
    except LedgerError as error:
        tally.unbegun += 1
        began = "No ledger" not in str(error) and "holds nothing yet" not in str(error)
        return str(error) if said or began else None
    tally.events += sum(event.actor == f"trial {trial}" for event in events)
    if said is None:
        return None
    tally.unacknowledged += len(events) == said[1] != said[0]
    if len(events) in said:
        return None
    return f"{said[0]} events were acknowledged, {said[1]} would be next, {len(events)} are there"


if __name__ == "__main__":
    main()
