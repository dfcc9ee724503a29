"""Planned against measured peaks of `ullage run` on CPU, and runs in a cgroup set to their budget.

python benchmarks/planned_vs_measured.py              # the table of the README
python benchmarks/planned_vs_measured.py --runs 50    # runs under a hard cap; 0 kills wanted
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from ullage import Recipe, TechniqueChoice, Workload, build_plan, default_execution, resolve
from ullage.errors import DoesNotFit
from ullage.measure.cage import Cage
from ullage.planner import fit_run
from ullage.planner.search import Freedom
from ullage.runtime.checkpoint import weights_folder
from ullage.specs.device import find_device
from ullage.units import MIB

MODEL = "smollm2-135m"
LENGTHS = (512, 2048, 4096, 8000)
SCHEMES = ("fp32", "int8", "nf4")
OUTPUT_TOKENS = 16
WORD_TOKENS = 1  # " the" is one token


def recipe_of(scheme: str, prompt_tokens: int, output_tokens: int) -> Recipe:
    """The recipe that `ullage run --weights SCHEME` runs."""
    model, device = resolve(MODEL), find_device("cpu-16gb")
    quantized = () if scheme == "fp32" else (TechniqueChoice("quantization", {"scheme": scheme}),)
    work = Workload(prompt_tokens, output_tokens)
    return Recipe(model, device, work, default_execution(device), quantized)


def table(repeats: int) -> bool:
    """Print the table; True when every mean difference is within 5 %."""
    weights_folder(resolve(MODEL))  # converted before anything is measured
    print("| tokens | weights | planned MiB | measured MiB (se) | difference | n |")
    print("|---|---|---|---|---|---|")
    good = True
    for scheme in SCHEMES:
        for tokens in LENGTHS:
            plan = build_plan(recipe_of(scheme, tokens, OUTPUT_TOKENS))
            peaks = [run_peak(tokens, scheme) for _ in range(repeats)]
            error = mean(peaks) / plan.peak_bytes - 1
            deviation = stdev(peaks) / repeats**0.5 / MIB if repeats > 1 else float("nan")
            good &= abs(error) <= 0.05
            print(
                f"| {tokens:,} | {scheme} | {plan.peak_bytes / MIB:,.1f} | "
                f"{mean(peaks) / MIB:,.1f} ({deviation:.1f}) | {error:+.1%} | {repeats} |",
                flush=True,
            )
    return good


def run_peak(prompt: int, scheme: str) -> int:
    """The most bytes that `ullage run` held, by the kernel's account of the process."""
    with tempfile.TemporaryDirectory() as scratch:
        command = run_command(Path(scratch), prompt, OUTPUT_TOKENS, scheme)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    return usage.ru_maxrss * 1024


def capped_runs(count: int, seed: int) -> bool:
    """Run `count` random requests, each in a cgroup set to its budget; True when none was killed.

    Half the budgets are the plan's own peak, the smallest that ullage accepts; the others leave
    the choice of precision to ullage.
    """
    draw = random.Random(seed)
    weights_folder(resolve(MODEL))  # converted outside the cap
    killed = 0
    for number in range(count):
        prompt, output = draw.randint(1, 8000), draw.randint(1, 48)
        scheme = draw.choice(SCHEMES)
        recipe = recipe_of(scheme, prompt, output)
        fixed = draw.random() < 0.5
        if not fixed:  # anything that some precision fits
            least = smallest_bytes(recipe)
            budget_bytes = draw.randint(least, build_plan(recipe).peak_bytes + least)
        else:
            budget_bytes = build_plan(recipe).peak_bytes
        code, peak_bytes = run_capped(prompt, output, scheme if fixed else None, budget_bytes)
        killed += code != 0
        print(
            f"{number + 1:3} {prompt:5} + {output:2} tokens, "
            f"{scheme if fixed else 'any':4} in {budget_bytes / MIB:7.1f} MiB: exit {code}, "
            f"kernel saw {peak_bytes / MIB:7.1f} MiB",
            flush=True,
        )
    print(f"{count} runs, {killed} killed or failed")
    return killed == 0


def smallest_bytes(recipe: Recipe) -> int:
    """The least that any precision needs."""
    plain = replace(recipe, techniques=())
    low, high = 1, build_plan(plain).peak_bytes
    while low < high:
        middle = (low + high) // 2
        try:
            fit_run(plain, middle, Freedom())
            high = middle
        except DoesNotFit:
            low = middle + 1
    return low


def run_capped(prompt: int, output: int, scheme: str | None, budget_bytes: int) -> tuple[int, int]:
    """`ullage run` in a cgroup of `budget_bytes`: its exit code, and the peak the kernel saw."""
    with tempfile.TemporaryDirectory() as scratch, Cage(budget_bytes) as cage:
        command = run_command(Path(scratch), prompt, output, scheme)
        command += ["--memory", str(budget_bytes)]
        process = cage.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _, errors = process.communicate()
    if process.returncode:
        print(errors.strip().splitlines()[-1:], file=sys.stderr)
    return process.returncode, cage.report().peak_bytes or 0


def run_command(folder: Path, prompt: int, output: int, scheme: str | None) -> list[str]:
    """`ullage run` of `prompt` tokens, written into `folder`; without a `scheme` it chooses one."""
    text = folder / "prompt.txt"
    text.write_text(" the" * (prompt // WORD_TOKENS))
    command = [sys.executable, "-m", "ullage", "run", MODEL, "--prompt-file", str(text)]
    command += ["--max-new-tokens", str(output), "--device", "cpu-16gb"]
    if scheme:  # the plan's own settings, nothing to choose
        command += ["--weights", scheme, "--kv-cache-dtype", "fp32", "--prefill-chunk", "512"]
    return command


def main() -> int:
    """Parse, run, and return 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="processes for each cell")
    parser.add_argument("--runs", type=int, default=0, help="random capped runs instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    good = capped_runs(options.runs, options.seed) if options.runs else table(options.repeats)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
