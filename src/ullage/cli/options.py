"""The options that commands share, as they are typed."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ullage.specs.workload import Attention, Engine

DEFAULT_OUTPUT_TOKENS = 256
NamedRecipe = Literal["hybrid"]
_MOST = 1 << 31  # of anything that is counted here: no machine comes near, and floats hold

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A catalog name, a local folder, a config.json, a .gguf file, or a hub id.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME|SIZE",
        help="A catalog name, a size, or cpu. Default: this machine.",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="A budget inside the device: 20GiB, 900MiB, 80%."
    ),
]
MaxModelLenOption = Annotated[
    str | None,
    typer.Option(
        "--max-model-len",
        metavar="TOKENS",
        help="Prompt and output together: 8192, 32K. Default: the model's context.",
    ),
]
MaxNumSeqsOption = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs",
        min=1,
        max=_MOST,
        help="Sequences at the same time, and the server's own limit. Default: 1, and the "
        "server's default limit.",
    ),
]
OutputLenOption = Annotated[
    str | None,
    typer.Option(
        "--output-len",
        metavar="TOKENS",
        help=f"Of these, tokens written. Default: {DEFAULT_OUTPUT_TOKENS}.",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT",
        help="Format of the weights: fp32, bf16, int8, nf4; fp8, int4 and others in vllm, GGUF "
        "types in llama.cpp. Default: bf16 on accelerators, fp32 on CPU.",
    ),
]
KvOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        metavar="FORMAT",
        help="Format of the KV entries: fp32, bf16, fp16; int8 in ullage and vllm, fp8 in ullage "
        "(CUDA), vllm and sglang, q8_0 and others in llama.cpp. Default: that of the arithmetic.",
    ),
]
AttentionOption = Annotated[
    Attention | None,
    typer.Option(
        "--attention",
        help="eager builds the score matrix, quadratic in the prompt; the others do not. Default: "
        "the engine's.",
    ),
]
ChunkOption = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        min=0,
        max=_MOST,
        help="Prompt tokens a forward pass; 0: all at once. Default: the engine's: 512 in ullage "
        "and llama.cpp, all at once in transformers, by the device's memory in vllm and sglang.",
    ),
]
TechniqueOption = Annotated[
    list[str] | None,
    typer.Option(
        "--technique", metavar="NAME:key=value", help="A memory technique; may be given again."
    ),
]
RecipeOption = Annotated[
    NamedRecipe | None,
    typer.Option(
        "--recipe",
        help="hybrid: 4-bit weights and a sparse KV cache, --weights nf4 --technique dms, with the "
        "model's own adapter, at a quarter of 8,000 tokens' bytes, where one is shipped.",
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="Whose memory is planned: ullage's own engine, transformers' generate, or a server's.",
    ),
]
EngineVersionOption = Annotated[
    str,
    typer.Option(
        "--engine-version",
        metavar="VERSION",
        help="Of --engine, as 0.19.0. Default: the newest with figures of its own.",
    ),
]
TpOption = Annotated[
    int, typer.Option("--tp", min=1, help="Devices that share each layer (tensor parallel).")
]
PpOption = Annotated[
    int, typer.Option("--pp", min=1, help="Devices that share the stack (pipeline parallel).")
]
UtilizationOption = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        min=0.01,
        max=1.0,
        help="Share of a device that vllm takes (sglang: --mem-fraction-static). "
        "Default: the engine's.",
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Figures of this machine, written by `ullage audit`."),
]
