"""Prefill and decode speed: ullage's engine against transformers' generate, on the same work.

    python benchmarks/speed.py --prompt 2048 --output 64 --repeats 5

One process, the same fp32 weights read from the same folder, runs taken in turns; then ullage with
quantized weights and with bf16 KV. A ratio above 1 means that ullage is faster.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

from ullage import Recipe, TechniqueChoice, Workload, build_plan, resolve
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.engine import Engine, Request
from ullage.runtime.load import load_model, load_tokenizer
from ullage.specs.device import find_device
from ullage.specs.workload import Execution

MODEL = "smollm2-135m"
Timed = Callable[[list[int], int], tuple[float, float]]  # seconds to the first token, for the rest


class _Clock(StoppingCriteria):
    """Notes the time of each token that generate writes."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def transformers_runner(folder: Path) -> Timed:
    """Plain generate: SDPA, DynamicCache, greedy."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(prompt: list[int], output_tokens: int) -> tuple[float, float]:
        ids, clock = torch.tensor([prompt]), _Clock()
        start_s = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        return clock.times_s[0] - start_s, clock.times_s[-1] - clock.times_s[0]

    return run


def ullage_runner(folder: Path, scheme: str, kv_dtype: str, work: Workload) -> Timed:
    """ullage's engine, greedy, chunks of 512."""
    quantized = () if scheme == "fp32" else (TechniqueChoice("quantization", {"scheme": scheme}),)
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype)
    recipe = Recipe(resolve(MODEL), find_device("cpu-16gb"), work, execution, quantized)
    plan = build_plan(recipe)
    engine = Engine(load_model(plan, folder, load_tokenizer(folder)).without_end(), plan)

    def run(prompt: list[int], output_tokens: int) -> tuple[float, float]:
        start_s = time.perf_counter()
        tokens = engine.generate(Request(prompt, output_tokens))
        next(tokens)
        first_s = time.perf_counter()
        for _ in tokens:
            pass
        return first_s - start_s, time.perf_counter() - first_s

    return run


def compare(name: str, base: Timed, other: Timed, options: argparse.Namespace) -> None:
    """Run both in turns and print a row of the table."""
    prompt = [20_000 + index % 10_000 for index in range(options.prompt)]
    rest = options.output - 1
    pairs = []
    for _ in range(options.repeats + 1):
        pairs.append((base(prompt, options.output), other(prompt, options.output)))
    pairs = pairs[1:]  # the first warms up
    cells = []
    for part, tokens in ((0, options.prompt), (1, rest)):
        rates = [tokens / ours[part] for _, ours in pairs]
        ratios = [theirs[part] / ours[part] for theirs, ours in pairs]
        error = stdev(ratios) / len(ratios) ** 0.5
        cells += [f"{mean(rates):,.1f}", f"{mean(ratios):.2f} ± {error:.2f}"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder = weights_folder(resolve(MODEL))
    base = transformers_runner(folder)
    work = Workload(options.prompt, options.output)
    print("| ullage with | prefill tokens/s | ratio | decode tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for scheme, kv in (("fp32", "fp32"), ("fp32", "bf16"), ("int8", "fp32"), ("nf4", "fp32")):
        other = ullage_runner(folder, scheme, kv, work)
        compare(f"{scheme} weights, {kv} KV", base, other, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
