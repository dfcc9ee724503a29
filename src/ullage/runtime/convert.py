"""Convert a GGUF file to a transformers folder.

``python -m ullage.runtime.convert GGUF FOLDER DTYPE``, DTYPE as torch names it.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the dequantized weights of `gguf` in `dtype` as safetensors, its config and its
    tokenizer into `folder`, and wait until they are on disk."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).to(dtype)
    # The weights are plain numbers now, but the model calls itself quantized and refuses to save.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="1000GB")
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3]))
