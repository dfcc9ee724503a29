"""Convert a GGUF file to a transformers folder, a tensor at a time.

``python -m ullage.runtime.convert GGUF FOLDER DTYPE``, DTYPE as torch names it.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

if TYPE_CHECKING:
    from gguf import ReaderTensor

_ROWS = 256  # dequantized at once: gguf holds them twice
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the dequantized weights of `gguf` in `dtype` as safetensors, its config and its
    tokenizer into `folder`, and wait until they are on disk. No more than one tensor is held, in
    fp32 and in `dtype`."""
    named: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    AutoTokenizer.from_pretrained(gguf.parent, **named).save_pretrained(folder)
    config = AutoConfig.from_pretrained(gguf.parent, **named)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _convert_weights(gguf, folder / "model.safetensors", model, dtype)
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _convert_weights(gguf: Path, file: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    stored = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
    shapes = {name: weight.shape for name, weight in model.state_dict().items() if name in stored}
    weights = ((name, _weight(stored[name], processor)) for name in shapes)
    _write(file, shapes, dtype, weights)


def _weight(tensor: "ReaderTensor", processor: TensorProcessor) -> torch.Tensor:
    """The tensor in fp32, as transformers' own model lays it out."""
    from gguf import dequantize

    weight = np.empty(tuple(reversed(tensor.shape.tolist())), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        weight[rows] = dequantize(tensor.data[rows], tensor.tensor_type)
    laid_out = processor.process(weight, tensor.name, parsed_parameters={"tensors": {}}).weights
    return torch.from_numpy(laid_out)


def _write(
    file: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    weights: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """A safetensors file of `weights`, which come in the order of `shapes`. The format: the
    header's length, the header in JSON, the numbers (https://github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, weight in weights:
            if weight.shape != shapes[name]:
                raise ValueError(f"{name} has shape {list(weight.shape)}, not {list(shapes[name])}")
            out.write(weight.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            del weight  # before the next is made


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3]))
