"""The table of docs/planning.md: what the practice asks for, as it is and with each technique.

python benchmarks/practice.py
"""

from ullage import (
    Plan,
    Recipe,
    TechniqueChoice,
    Workload,
    build_plan,
    default_execution,
    find_device,
    resolve,
)
from ullage.units import GIB

REQUESTS = (
    ("mistral-7b-v0.3", 8192, 1, "rtx-4060"),
    ("qwen3-4b", 8192, 1, "rtx-4060"),
    ("llama-3.2-3b", 131_072, 1, "rtx-4080"),
    ("qwen3-14b", 32_768, 4, "rtx-4090"),
    ("llama-2-13b", 4096, 8, "rtx-3090"),
    ("qwen3-32b", 32_768, 1, "rtx-4090"),
    ("mistral-small-24b", 32_768, 1, "a100-40gb"),
    ("mistral-small-24b", 32_768, 8, "a100-40gb"),
    ("gpt-oss-20b", 32_768, 8, "a100-40gb"),
)
NF4 = TechniqueChoice("quantization", {"scheme": "nf4"})
INT8 = TechniqueChoice("quantization", {"scheme": "int8"})
DMS = TechniqueChoice("dms", {"kept": 0.125})
COLUMNS = {"as it is": (), "int8": (INT8,), "nf4": (NF4,), "dms": (DMS,), "both": (NF4, DMS)}
OUTPUT_TOKENS = 256


def main() -> None:
    """Print a row a request: peak in GiB, longest context and most sequences of each."""
    for model, tokens, sequences, device in REQUESTS:
        print(f"{model}, {sequences} x {tokens:,}, {device}")
        for name, chosen in COLUMNS.items():
            if resolve(model).prequantized and chosen[:1] in ((NF4,), (INT8,)):
                continue
            plan = planned(model, tokens, sequences, device, chosen)
            print(
                f"  {name:9} {plan.peak_bytes / GIB:6.2f} of {plan.budget_bytes / GIB:.2f} GiB, "
                f"to {plan.cliff.max_model_len} tokens or {plan.cliff.max_num_seqs} sequences"
            )


def planned(
    model: str, tokens: int, sequences: int, device: str, chosen: tuple[TechniqueChoice, ...]
) -> Plan:
    """The plan of ullage's own engine on the whole device."""
    place = find_device(device)
    work = Workload(tokens - OUTPUT_TOKENS, OUTPUT_TOKENS, sequences)
    return build_plan(Recipe(resolve(model), place, work, default_execution(place), chosen))


if __name__ == "__main__":
    main()
