"""Compiles Triton's kernel for a GPU that need not be there: ``python compile_triton.py CASE
CAPABILITY``, which is 80 for an A100 and 90 for an H100.

In a process of its own: where Triton interprets, it cannot compile. Prints what it found, as JSON.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ullage.kv.kernels.triton_code import FORMATS, attend_split, join_splits

BF16 = FORMATS[torch.bfloat16]
ATTEND = {
    "D": 128, "WIDTH": 128, "ROWS": 16, "TOKENS": 64, "STORED": BF16, "PRODUCT": BF16,
    "ALIGNED": True, "HIDING": False, "CAPPED": False,
    "BIASED": False, "ASKED": False,
}  # fmt: skip
CHUNK = ATTEND | {"ROWS": 64, "HIDING": True, "CAPPED": True}
BANK = {"BIASED": True, "ASKED": True}
INT8 = {"STORED": FORMATS[torch.int8]}
FP8 = {"STORED": FORMATS[torch.float8_e4m3fn]}
CASES = {
    "decode": (attend_split, ATTEND),
    "chunk": (attend_split, CHUNK),
    "decode int8": (attend_split, ATTEND | INT8),
    "chunk int8": (attend_split, CHUNK | INT8),
    "decode fp8": (attend_split, ATTEND | FP8),
    "chunk fp8": (attend_split, CHUNK | FP8),
    "decode bank": (attend_split, ATTEND | BANK),
    "chunk bank int8": (attend_split, CHUNK | BANK | INT8),
    "join": (join_splits, {"D": 128, "WIDTH": 128}),
}
POINTERS = {
    "query": "*bf16", "output": "*bf16", "work": "*i64", "partial": "*fp32", "partial_lse": "*fp32",
}  # fmt: skip
TYPES = POINTERS | {"scale": "fp32", "softcap": "fp32"}

program, constants = CASES[sys.argv[1]]
source = ASTSource(
    program,
    {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in program.arg_names},
    {(program.arg_names.index(name),): value for name, value in constants.items()},
)
target = GPUTarget("cuda", int(sys.argv[2]), 32)
compiled = triton.compile(source, target=target, options={"num_stages": 2})
ptx = compiled.asm["ptx"]
found = {
    "machine_code_bytes": len(compiled.asm["cubin"]),
    "shared_bytes": compiled.metadata.shared,
    "matrix_products": len(re.findall(r"mma(?:_async)?\.sync\S*bf16", ptx)),
    "copies_of_16_bytes": len(re.findall(r"cp\.async\.cg.*0x10,", ptx)),
}
print(json.dumps(found))
