"""Weights in 8 or 4 bits: one int8 scale a row, or QLoRA's NF4. Activations stay as they are."""
