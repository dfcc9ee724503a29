r"""Reading and writing with CAMELoT, beside a plain window of as many tokens as its segment.

    GOMP_SPINCOUNT=5000 python benchmarks/camelot_speed.py --technique segment=512

The same weights and kernels; GOMP_SPINCOUNT as ullage sets it where it is imported before torch.
Prompts are read in turns, in chunks of 512. Then tokens are written one by one, for one sequence,
in turns of as many as a segment has, so that what a segment's end takes is in each turn once. A
ratio is the time of CAMELoT over that of the window, given with its standard error.
"""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from statistics import mean, stdev

import torch

from dms_speed import MODEL, Way, in_turns
from ullage import Recipe, Workload, build_plan, resolve, techniques
from ullage.measure.quality.sides import attached
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.load import load_model, load_tokenizer
from ullage.specs.device import find_device
from ullage.specs.workload import Execution
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS


class Writer(Way):
    """Writes several tokens a turn."""

    def write_all(self, tokens: int) -> None:
        """So many, one after the other."""
        for _ in range(tokens):
            self.write()


def report(what: str, taken_s: list[list[float]], tokens: int) -> None:
    """A line of the table, of turns of so many tokens each."""
    window, bank = taken_s
    ratios = [one / other for one, other in zip(bank, window, strict=True)]
    error = f" ± {stdev(ratios) / len(ratios) ** 0.5:.2f}" if len(ratios) > 1 else ""
    window_ms, bank_ms = (mean(part) / tokens * 1e3 for part in taken_s)
    print(
        f"| {what} | {window_ms:.2f} | {bank_ms:.2f} | {mean(ratios):.2f}{error} | {len(ratios)} |",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--technique", default="segment=512", help="settings of CAMELoT")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3, help="of writing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    bank = techniques.parse(f"camelot:{asked.technique}")
    assert isinstance(bank, CAMELoT)
    window = DMS(window=bank.segment, predictor="window")
    spec, execution = resolve(MODEL), Execution(dtype="fp32", kv_dtype="fp32")
    work = Workload(asked.tokens, (asked.turns + 1) * bank.segment)
    recipe = Recipe(spec, find_device("cpu-16gb"), work, execution)
    folder = weights_folder(spec)
    with ExitStack() as stack:
        model = load_model(build_plan(recipe), folder, load_tokenizer(folder)).model
        ways = [
            Writer(
                stack.enter_context(attached(model, [one])),
                replace(recipe, techniques=(techniques.choice_of(one),)),
                sequences=1,
            )
            for one in (window, bank)
        ]
        random = torch.Generator().manual_seed(0)
        prompt = torch.randint(1000, spec.vocab_size, (asked.tokens,), generator=random)
        print(f"{asked.technique}, {asked.threads} threads\n")
        print("| what | window ms | CAMELoT ms | ratio (se) | n |\n|---|---|---|---|---|")
        in_turns(ways, "read", 1, prompt[: 2 * bank.segment])
        read = in_turns(ways, "read", asked.prompts, prompt)
        report(f"a token of {asked.tokens:,}, read", read, asked.tokens)
        in_turns(ways, "write_all", 1, min(bank.segment, 8))
        written = in_turns(ways, "write_all", asked.turns, bank.segment)
        report("a token, written", written, bank.segment)


if __name__ == "__main__":
    main()
