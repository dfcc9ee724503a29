"""The peak of one planned run, in a fresh process: ``python -m ullage.measure.peak < REQUEST``."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from ullage.errors import UllageError
from ullage.runtime import out_of_memory
from ullage.specs.measurement import PeakMeasurement
from ullage.specs.plan import Plan
from ullage.specs.workload import PhaseName


def measure_peak(
    plan: Plan, folder: Path, *, steady_allocator: bool = True, preload: str | None = None
) -> PeakMeasurement:
    """Run `plan` on the weights in `folder` in a process of its own.

    Args:
        steady_allocator: as `ullage run` sets the allocator; False leaves glibc's defaults.
        preload: a shared library to put before glibc's allocator, such as jemalloc's.

    Raises:
        UllageError: the process failed or was killed.
    """
    request = {"plan": plan.to_json(), "folder": str(folder), "steady_allocator": steady_allocator}
    environment = dict(os.environ) | ({"LD_PRELOAD": preload} if preload else {})
    done = subprocess.run(
        [sys.executable, "-m", "ullage.measure.peak"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UllageError(f"The measured process ended with {done.returncode}: {lines[-1]}")
    return PeakMeasurement(**json.loads(done.stdout.strip().splitlines()[-1]))


def run_and_measure(plan: Plan, folder: Path, steady_allocator: bool) -> PeakMeasurement:
    """Run `plan` in this process with a prompt of its length and measure each phase."""
    start_s = _process_start_s()
    from ullage.runtime.allocator import return_freed_memory

    if steady_allocator:
        return_freed_memory()
    from ullage.runtime.engine import Engine, Request
    from ullage.runtime.load import device_of, load_model, load_tokenizer
    from ullage.runtime.memory import held_bytes, peak_bytes, reset_peak

    work, device = plan.recipe.workload, device_of(plan.recipe)
    tokenizer = load_tokenizer(folder)
    peaks: dict[PhaseName, int] = {}
    runtime_bytes = held_bytes(device)
    before_load_s = time.perf_counter()
    loaded = load_model(plan, folder, tokenizer)
    load_s = time.perf_counter() - before_load_s
    peaks["load"] = peak_bytes(device)
    reset_peak(device)
    engine = Engine(loaded.without_end(), plan)
    # ids that stay clear of special tokens at the vocabulary's start
    vocabulary = plan.recipe.model.vocab_size
    prompt = [vocabulary // 2 + index % (vocabulary // 4) for index in range(work.prompt_tokens)]
    request = Request(prompt, work.output_tokens)
    engine.submit(request)
    while not request.output_ids:
        engine.step()
    first_token_s = time.time() - start_s
    peaks["prefill"] = peak_bytes(device)
    reset_peak(device)
    before_decode_s = time.perf_counter()
    live_bytes = loaded.nbytes() + engine.cache.nbytes()
    held = held_bytes(device)
    while not request.finished:
        engine.step()
    decode_s = time.perf_counter() - before_decode_s
    peaks["decode"] = peak_bytes(device)
    return PeakMeasurement(
        prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens,
        runtime_bytes=runtime_bytes,
        phase_peak_bytes=peaks,
        live_bytes=live_bytes,
        held_bytes=held,
        load_s=load_s,
        first_token_s=first_token_s,
        decode_tokens_per_second=(work.output_tokens - 1) / decode_s,
    )


def _process_start_s() -> float:
    import psutil

    return psutil.Process().create_time()


def _main() -> int:
    import_module("ullage.cli.run")  # in memory, too, while the command runs a model
    request = json.load(sys.stdin)
    try:
        plan, folder = Plan.from_json(request["plan"]), Path(request["folder"])
        with out_of_memory.explained():
            measured = run_and_measure(plan, folder, request["steady_allocator"])
    except UllageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
