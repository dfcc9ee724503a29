"""Where KV bytes live: a pool of blocks with one owner, a cache over it, and attention that reads
it."""
