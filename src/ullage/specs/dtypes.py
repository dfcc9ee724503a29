"""The number formats that weights, KV entries and arithmetic use, by their short names."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

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
