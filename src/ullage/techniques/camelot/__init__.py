"""CAMELoT: what leaves the window is consolidated into an associative memory of fixed size."""
