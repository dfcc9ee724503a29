"""How long a search over some 5,000 combinations takes, without torch.

    python benchmarks/search_speed.py [--engine ullage|vllm|llama.cpp|...]

As many devices of the catalog are searched as 5,000 combinations need. Prints seconds of the clock
and of this process's own, the fastest of five, for each goal.
"""

import argparse
import sys
import time
from typing import get_args

from ullage import Recipe, Workload, default_execution, find_device, resolve
from ullage.planner.explore import Goal, explore
from ullage.planner.search import Freedom
from ullage.specs.device import catalog
from ullage.specs.workload import Engine

COMBINATIONS = 5000
RUNS = 5


def main() -> None:
    """Search, and print a line a goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=get_args(Engine), default="ullage")
    parser.add_argument("--model", default="llama-3.1-8b")
    arguments = parser.parse_args()
    device = find_device("rtx-4090")
    execution = default_execution(device, arguments.engine)
    recipe = Recipe(resolve(arguments.model), device, Workload(8000, 192), execution)
    others = [found for found in catalog().values() if found != device]
    single = len(explore(recipe, None, "latency", Freedom()).every)
    others = others[: -(-COMBINATIONS // single) - 1]
    for goal in get_args(Goal):
        clock_s, own_s, tried = min(_timed(recipe, goal, others) for _ in range(RUNS))
        print(
            f"{arguments.engine}, {goal}: {tried:,} combinations in {clock_s:.2f} s, "
            f"{own_s:.2f} s of this process"
        )
    assert "torch" not in sys.modules


def _timed(recipe: Recipe, goal: Goal, others: list) -> tuple[float, float, int]:  # type: ignore[type-arg]
    clock_s, own_s = time.perf_counter(), time.process_time()
    tried = len(explore(recipe, None, goal, Freedom(), others).every)
    return time.perf_counter() - clock_s, time.process_time() - own_s, tried


if __name__ == "__main__":
    main()
