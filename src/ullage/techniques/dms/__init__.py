"""Dynamic Memory Sparsification: a learned choice of the KV entries to keep, carried out later."""
