r"""What reading a fact takes of a decode step, and of the first token.

    GOMP_SPINCOUNT=5000 python benchmarks/larimar_speed.py --data DIR [--tokens 512] [--facts 1000]

Prompts about a fact, filled up with a text to so many tokens, and the same prompts where no memory
is attached, by turns: the same weights, kernels and cache. GOMP_SPINCOUNT as ullage sets it where
it is imported before torch. The gate chooses among all facts; the answer never comes, so that the
fact is seen in each step. A ratio is the time with a fact over that without, with its standard
error.
"""

import time
from statistics import mean, stdev
from typing import Any

import torch

from counterfact import Record, adapter_of, fact_of, opened, parser, shown
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks
from ullage.specs.families import spec_from_config
from ullage.techniques.larimar.facts import FactMemory

STEPS = 32  # of each prompt
PROMPTS = 20


def main() -> None:
    """Time both ways, and print their ratio."""
    asking = parser(__doc__, facts=1000)
    asking.add_argument("--tokens", type=int, default=512, help="of a prompt")
    given = asking.parse_args()
    model, tokenizer, records = opened(given)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    memory = FactMemory(model, tokenizer, adapter=adapter_of(given))
    memory.ledger.add(map(fact_of, records), memory.who)
    text = tokenizer((given.data / "wikitext2_test.txt").read_text(encoding="utf-8")[:20_000])
    prompts = [prompt_of(record, tokenizer, text["input_ids"], given.tokens) for record in records]
    times = [taken_s(model, memory, prompt) for prompt in shown(prompts[: PROMPTS + 1], "asking")]
    print("| what | without, ms | with a fact, ms | ratio (se) | n |\n|---|---|---|---|---|")
    for at, what in enumerate((f"a prompt of {given.tokens} tokens", "a decode step")):
        report(what, [(without[at], behind[at]) for without, behind in times[1:]])
    print(f"\n{len(records):,} facts, {torch.get_num_threads()} threads, {given.model}, fp32")


def prompt_of(record: Record, tokenizer: Any, text: list[int], tokens: int) -> torch.Tensor:
    """A fact's own prompt behind a text: [1, T]."""
    own = tokenizer(f"\n{record['prompt']}")["input_ids"]
    return torch.tensor([[*text[: tokens - len(own)], *own]])


def taken_s(
    model: Any, memory: FactMemory, prompt: torch.Tensor
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of the prompt, and of a step, without the memory and with it."""
    without = read_s(model, prompt)
    with memory.attached():
        memory.recall(prompt[0].tolist())  # its entries are at hand
        return without, read_s(model, prompt)


@torch.inference_mode()
def read_s(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """Seconds of the prompt, and of a step behind it."""
    spec = spec_from_config(model.config.to_dict())
    cache = PagedCache(spec, HeapBlocks(spec.head_dim, model.dtype, model.device))
    how = cache_argument(model, cache)
    token = torch.tensor([[11]])  # a comma: no answer
    start_s = time.perf_counter()
    model(prompt, **how, logits_to_keep=1)
    read_at_s = time.perf_counter()
    for _ in range(STEPS):
        model(token, **how)
    return read_at_s - start_s, (time.perf_counter() - read_at_s) / STEPS


def report(what: str, pairs: list[tuple[float, float]]) -> None:
    """A line of the table."""
    ratios = [behind / without for without, behind in pairs]
    without_ms, behind_ms = (1e3 * mean(side) for side in zip(*pairs, strict=True))
    error = stdev(ratios) / len(ratios) ** 0.5
    print(
        f"| {what} | {without_ms:.2f} | {behind_ms:.2f} | {mean(ratios):.3f} ± {error:.3f} "
        f"| {len(ratios)} |"
    )


if __name__ == "__main__":
    main()
