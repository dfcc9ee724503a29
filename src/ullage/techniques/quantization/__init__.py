"""Weights in 8 or 4 bits: LLM.int8-style per-channel int8 and QLoRA's NF4."""
