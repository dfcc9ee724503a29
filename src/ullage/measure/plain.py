"""Plain transformers, reading ever longer prompts until something stops it.

``python -m ullage.measure.plain FOLDER IDS_JSON LENGTH...`` prints a JSON line for each length that
it survived.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NEW_TOKENS = 8


def climb(folder: str, ids: list[int], lengths: list[int]) -> None:
    """`generate` on prompts of `lengths` as anybody would: one pass, DynamicCache, fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    print(json.dumps({"tokens": 0, "seconds": 0.0}), flush=True)
    for length in lengths:
        start_s = time.perf_counter()
        prompt = torch.tensor([ids[:length]])
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        seconds = time.perf_counter() - start_s
        print(json.dumps({"tokens": length, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    climb(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), [int(n) for n in sys.argv[3:]])
