"""What a vLLM log says of its start: the version, the flags and the parts of the memory.

The wordings are those of 0.6 to 0.33: vllm/worker/worker.py, vllm/v1/worker/gpu_worker.py,
vllm/v1/core/kv_cache_utils.py, vllm/utils/mem_utils.py.
"""

from dataclasses import dataclass

from ullage.doctor.diagnosis import Run, measured
from ullage.doctor.log import Found, Log
from ullage.specs.footprint import Term
from ullage.units import GIB

# What the parts of a start are called.
WEIGHTS, PROFILE_PEAK, NON_TORCH, GRAPHS, POOL = (
    "weights",
    "peak of the profiling pass",
    "context and libraries",
    "CUDA graphs",
    "KV pool",
)
_BLOCK_TOKENS = 16  # of vLLM's default KV block, where a log counts blocks only

SIGNS = (
    r"Initializing (?:a|an) (?:V1 )?LLM engine",
    r"vLLM API server version",
    r"vllm/(?:v1|worker|engine|entrypoints|executor|model_executor)/",
    r"(?:gpu_worker|gpu_model_runner|kv_cache_utils|executor_base)\.py:\d+\]",
    r"Available KV cache memory:",
    r"the rest of the memory reserved for KV Cache",
    r"GPU KV cache size:",
    r"the current vLLM instance can use",
    r"No available memory for the cache blocks",
    r"KV cache is needed, which is larger than the available KV cache memory",
    r"maximum number of tokens that can be stored in KV cache",
    r"warming up sampler with \d+ dummy requests",
    r"EngineDeadError",
    r"EngineCore failed to start",
    r"Engine core initialization failed",
    r"than desired (?:GPU|CPU) memory utilization",
    r"Maximum concurrency for {context#} tokens per request",
)
_VERSION = (
    r"LLM engine \(v?(?P<version>\d[\w.+-]*)\)",
    r"vLLM API server version (?P<version>\d[\w.+-]*)",
    r"[█▄▀] version (?P<version>\d[\w.+-]*)",
)
_WEIGHTS = (
    r"Model loading took {size}",
    r"Loading model weights took {size}",
    r"model weights take {size}",
    r"{size} for weight",
    r"weights memory: {size}",
)
_ACTIVATION = (
    r"PyTorch activation peak memory(?: takes)? {size}",
    r"{size} for peak activation",
    r"torch peak memory increase: {size}",
)
_NON_TORCH = (
    r"non_torch_memory(?: takes|=)? {size}; PyTorch",
    r"{size} for non-torch memory",
    r"non-torch forward increase memory: {size}",
    r"worker\.py:\d+\] non_torch_memory {size}",
    r"peak_torch_memory.*non_torch_memory={size}",
)
_CONSUMED = (r"{size} for consumed memory", r"total consumed \(from mem_get_info\): {size}")
_GRAPHS = (
    r"Graph capturing finished in \d+ secs?, took {size}",
    r"{size} for CUDAGraph memory",
    r"CUDA graph pool memory: {size} \(actual\)",
)
_POOL = (
    r"Available KV cache memory: {size-}",
    r"the rest of the memory reserved for KV Cache is {size-}",
    r"available_kv_cache_memory {size-}",
    r"kv_cache_size={size-}",
)
_TOTAL = (
    r"Free memory on device (?:\S+ )?\([\d.]+/{total%} GiB\)",
    r"total_gpu_memory ?[(=] ?{total%} GiB",
    r"worker\.py:\d+\] total_gpu_memory {total%} GiB",
    r"total_memory={total%} GiB",
)
_SHARE = (
    r"gpu_memory_utilization'?[:=] (?P<share>[01]\.\d{1,6})",
    r"gpu_memory_utilization \(?(?P<share>[01]\.\d{1,6})",
    r"(?:Desired|desired) GPU memory utilization(?: is)? \((?P<share>[01]\.\d{1,6})",
    r"--gpu-memory-utilization=(?P<share>[01]\.\d{1,6}) is equivalent",
)
TOKENS = r"KV cache size: {tokens#} tokens"
BLOCKS = r"# (?:GPU|CUDA|cuda|gpu) blocks: {blocks#}"
CONCURRENCY = r"Maximum concurrency for {context#} tokens per request: {times%}x"


@dataclass(frozen=True)
class Start:
    """The start that a log shows. Sizes are in bytes, and None where the log has none; of several
    workers the one that needs most counts. `pool_bytes` is negative where nothing was left."""

    version: str
    run: Run
    weights: Found | None
    activation: Found | None
    non_torch_bytes: int | None
    graphs: Found | None
    pool: Found | None
    total_bytes: int | None
    pool_tokens: int | None
    concurrency: Found | None

    @property
    def pool_bytes(self) -> int | None:
        """Bytes that were left for KV entries."""
        return None if self.pool is None else self.pool.size("size")

    def size(self, part: Found | None) -> int:
        """Bytes of a part, 0 where the log has none."""
        return 0 if part is None else part.size("size")

    def parts(self) -> tuple[Term, ...]:
        """The parts with their lines."""
        terms = [
            measured("weights", WEIGHTS, self.weights.size("size"), self.weights)
            if self.weights else None,
            measured("activation", PROFILE_PEAK, self.activation.size("size"),
                     self.activation) if self.activation else None,
            Term("overhead", NON_TORCH, self.non_torch_bytes, "measured", "the log")
            if self.non_torch_bytes else None,
            measured("overhead", GRAPHS, self.graphs.size("size"), self.graphs)
            if self.graphs else None,
            measured("kv", POOL, max(0, self.pool.size("size")), self.pool)
            if self.pool else None,
        ]  # fmt: skip
        return tuple(term for term in terms if term is not None)


def read_start(log: Log) -> Start | None:
    """The start, or None if the log is none of vLLM's."""
    if log.first(*SIGNS) is None:
        return None
    version = log.first(*_VERSION)
    weights = _largest(log, _WEIGHTS)
    total = log.first(*_TOTAL)
    return Start(
        version=version.text("version") if version else "",
        run=_run(log),
        weights=weights,
        activation=_largest(log, _ACTIVATION),
        non_torch_bytes=_non_torch_bytes(log, weights),
        graphs=_largest(log, _GRAPHS),
        pool=_smallest(log, _POOL),
        total_bytes=round(total.number("total") * GIB) if total else None,
        pool_tokens=_pool_tokens(log),
        concurrency=log.first(CONCURRENCY),
    )


def _largest(log: Log, patterns: tuple[str, ...]) -> Found | None:
    """The largest size of the first wording that the log has: workers differ by little."""
    for pattern in patterns:
        places = list(log.every(pattern))
        if places:
            return max(places, key=lambda place: place.size("size"))
    return None


def _smallest(log: Log, patterns: tuple[str, ...]) -> Found | None:
    for pattern in patterns:
        places = list(log.every(pattern))
        if places:
            return min(places, key=lambda place: place.size("size"))
    return None


def _non_torch_bytes(log: Log, weights: Found | None) -> int | None:
    own = _largest(log, _NON_TORCH)
    if own is not None:
        return own.size("size")
    consumed = _largest(log, _CONSUMED)
    if consumed is None or weights is None:
        return None
    return max(0, consumed.size("size") - weights.size("size"))


def _pool_tokens(log: Log) -> int | None:
    tokens = log.first(TOKENS)
    if tokens is not None:
        return tokens.count("tokens")
    blocks = log.first(BLOCKS)
    return None if blocks is None else blocks.count("blocks") * _BLOCK_TOKENS


def _run(log: Log) -> Run:
    return Run(
        # each place looks no further than the next: a line of nothing else would take for ever
        model=log.word(r"LLM engine (?:(?!LLM engine).)*?config: model='(?P<word>[^']{1,200})'",
                    r"non-default args: (?:(?!args:).)*?'model': '(?P<word>[^']{1,200})'"),
        dtype=log.word(r"dtype=torch\.(?P<word>\w+)"),
        kv_dtype=log.word(r"kv_cache_dtype=(?P<word>\w+)"),
        quantization=log.word(r" quantization='?(?P<word>[\w-]+)"),
        max_model_len=log.count(r"max_seq_len={n#}", r"max_model_len'?[:=] {n#}",
                             r"Using max model len {n#}"),
        max_num_seqs=log.count(r"max_num_seqs'?[:=] {n#}", r"Defaulting max_num_seqs to {n#}"),
        prefill_chunk=log.count(r"max_num_batched_tokens'?[:=] {n#}",
                             r"Defaulting max_num_batched_tokens to {n#}"),
        utilization=log.share(*_SHARE),
        tensor_parallel=log.count(r"tensor_parallel_size'?[:=] {n#}") or 1,
        pipeline_parallel=log.count(r"pipeline_parallel_size'?[:=] {n#}") or 1,
    )  # fmt: skip
