"""The number formats that weights, KV entries and arithmetic use, by their short names."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Where ullage stores KV entries in these, one token's K in one KV head has a scale, and its V.
SCALED = ("int8", "fp8")
SCALE_BYTES = 2  # bf16

# Bits of a stored KV number with its scales: llama.cpp's blocks of 32 hold one or two fp16 more.
KV_BITS = {
    "fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8,
    "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5,
}  # fmt: skip

# How config.json ("float32"), safetensors ("F32") and people ("bfloat16") call them.
_ALIASES = {
    "float32": "fp32", "float": "fp32", "f32": "fp32", "fp32": "fp32",
    "bfloat16": "bf16", "bf16": "bf16",
    "float16": "fp16", "half": "fp16", "f16": "fp16", "fp16": "fp16",
}  # fmt: skip


def dtype_name(text: str) -> str | None:
    """The short name (``fp32``, ``bf16``, ``fp16``) of a dtype as config.json or safetensors spell
    it, or None when it is none of these."""
    return _ALIASES.get(text.removeprefix("torch.").lower())


def kv_dtype_name(text: str) -> str | None:
    """The short name of a KV format in `KV_BITS`, however it is spelled, or None."""
    lower = text.lower()
    name = "fp8" if lower in ("fp8_e4m3", "fp8_e5m2") else dtype_name(lower) or lower
    return name if name in KV_BITS else None
