"""Processes that are killed while they write; benchmarks/larimar_kills.py does it 1,000 times."""

import random
import subprocess
import sys
import time
from pathlib import Path

from ullage.techniques.larimar.ledger import Ledger

TOGETHER = 7
WRITER = f"""
import sys
from pathlib import Path
from ullage.techniques.larimar.ledger import Fact, Ledger, Who
print("starts", flush=True)
with Ledger(Path(sys.argv[1]), create=True) as ledger:
    while True:
        done = 0 if ledger.head is None else ledger.head.number
        print(done, flush=True)
        ledger.add([Fact.make(f"The king of Land{{done + n}} is Bob") for n in range({TOGETHER})],
                   Who("me"))
"""


def killed(path: Path, chosen: random.Random) -> int:
    """The events that a process had acknowledged when it was killed: soon after it had said so for
    the first time, or for the second, ... or before."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    said = [writer.stdout.readline() for _ in range(chosen.randrange(9))]
    time.sleep(chosen.uniform(0, 0.005))
    writer.kill()
    said += writer.communicate()[0].splitlines(keepends=True)
    acknowledged = [line for line in said if line.endswith("\n")][1:]
    return int(acknowledged[-1]) if acknowledged else 0


def test_a_killed_process_loses_nothing_that_it_acknowledged(path: Path) -> None:
    """Nor does it leave a part of what it was at; the next process takes over from it."""
    chosen, events = random.Random(0), 0
    for _ in range(20):
        said = killed(path, chosen) or events  # what it found is what the one before it left
        if not said and (not path.exists() or not path.stat().st_size):
            continue  # killed before it began
        with Ledger(path, create=True) as ledger:
            ledger.verify()
            events = len(list(ledger.events()))
            assert events in (said, said + TOGETHER)
            assert len(ledger.facts()) == events
    assert events >= 20 * TOGETHER
