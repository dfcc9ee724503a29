r"""Reading and writing with DMS, beside the full cache: whole passes of the model.

    GOMP_SPINCOUNT=5000 python benchmarks/dms_speed.py \
        --technique kept=0.1,window=1270,predictor=linear,adapter=smollm2-135m

GOMP_SPINCOUNT as ullage sets it where it is imported before torch: see kernels/threads.py. The
same weights and kernels, the full cache in packed blocks. Prompts are read in turns, in chunks of
512; then a token a step is written, in turns, for one sequence and for `--batch` copies of it,
which hold their own entries. A ratio above 1 means that DMS is faster, given with its standard
error.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import mean, stdev

import torch

from ullage import Recipe, Workload, build_plan, resolve, techniques
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.cache import Sequence as CachedSequence
from ullage.kv.pool import KVPool
from ullage.measure.quality.sides import CHUNK_TOKENS, attached
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.engine import rows_of
from ullage.runtime.load import TORCH_DTYPES, load_model, load_tokenizer
from ullage.specs.device import find_device
from ullage.specs.workload import Execution

MODEL = "smollm2-135m"
WARM_UP = 2  # steps


class Way:
    """One way to keep entries: the model with it, and a pool for `sequences`."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, sequences: int) -> None:
        self.model, work = model, recipe.workload
        blocks = sequences * techniques.sequence_blocks(recipe, work.context_tokens)
        kv_dtype = TORCH_DTYPES[recipe.execution.kv_dtype]
        pool = KVPool(blocks, recipe.model.head_dim, kv_dtype)
        self.cache, self.tokens = PagedCache(recipe.model, pool, rows_of(recipe)), work
        self.open: list[CachedSequence] = []

    def read(self, prompt: torch.Tensor) -> None:
        """`prompt`, [T], into a sequence of its own, the only one."""
        self.close()
        self.open = [self.cache.open(self.tokens.context_tokens)]
        for chunk in torch.split(prompt, CHUNK_TOKENS):
            self.step(chunk[None])

    def multiply(self, copies: int) -> None:
        """As many copies of the sequence that is open."""
        self.open += [self.open[0].copy() for _ in range(copies - len(self.open))]

    def write(self) -> None:
        """A token for each sequence."""
        self.step(torch.full((len(self.open), 1), 500))

    def close(self) -> None:
        """Give all blocks back."""
        for sequence in self.open:
            sequence.close()

    def step(self, ids: torch.Tensor) -> None:
        """`ids`, [B, N], in one pass."""
        self.cache.activate(self.open)
        first = self.open[0].length
        positions = torch.arange(first, first + ids.shape[1]).expand(len(ids), -1)
        self.model(
            input_ids=ids,
            position_ids=positions,
            **cache_argument(self.model, self.cache),
            use_cache=True,
            logits_to_keep=1,
        )


def in_turns(ways: Sequence[Way], act: str, times: int, *given: object) -> list[list[float]]:
    """Seconds of each of `times` turns, [ways][times]."""
    taken_s: list[list[float]] = [[] for _ in ways]
    for _ in range(times):
        for way, seconds in zip(ways, taken_s, strict=True):
            start_s = time.perf_counter()
            getattr(way, act)(*given)
            seconds.append(time.perf_counter() - start_s)
    return taken_s


def report(what: str, taken_s: list[list[float]]) -> None:
    """A line of the table."""
    dense, sparse = taken_s
    ratios = [one / other for one, other in zip(dense, sparse, strict=True)]
    error = f" ± {stdev(ratios) / len(ratios) ** 0.5:.2f}" if len(ratios) > 1 else ""
    print(
        f"| {what} | {mean(dense) * 1e3:,.0f} | {mean(sparse) * 1e3:,.0f} "
        f"| {mean(ratios):.2f}{error} | {len(ratios)} |",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--technique", required=True)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    spec, execution = resolve(MODEL), Execution(dtype="fp32", kv_dtype="fp32")
    work = Workload(asked.tokens, 2 * (asked.steps + WARM_UP))
    chosen = techniques.parse(f"dms:{asked.technique}").settled(spec, work, execution)
    recipe = Recipe(spec, find_device("cpu-16gb"), work, execution)
    sparse = Recipe(spec, recipe.device, work, execution, (techniques.choice_of(chosen),))
    folder = weights_folder(spec)
    with ExitStack() as stack:
        model = load_model(build_plan(recipe), folder, load_tokenizer(folder)).model
        twin = stack.enter_context(attached(model, [chosen]))
        dense_twin = stack.enter_context(attached(model, []))
        ways = [Way(dense_twin, recipe, asked.batch), Way(twin, sparse, asked.batch)]
        random = torch.Generator().manual_seed(0)
        prompt = torch.randint(1000, spec.vocab_size, (asked.tokens,), generator=random)
        held = [techniques.sequence_blocks(one, asked.tokens) for one in (recipe, sparse)]
        print(
            f"{asked.technique}: {held[1] / held[0]:.1%} of the blocks, {asked.threads} threads\n"
        )
        print("| what | full cache ms | DMS ms | ratio (se) | n |\n|---|---|---|---|---|")
        in_turns(ways, "read", 1, prompt[:2000])
        report(f"read {asked.tokens:,} tokens", in_turns(ways, "read", asked.prompts, prompt))
        for copies in (1, asked.batch):
            for way in ways:
                way.multiply(copies)
            in_turns(ways, "write", WARM_UP)
            report(f"a step, batch {copies}", in_turns(ways, "write", asked.steps))


if __name__ == "__main__":
    main()
