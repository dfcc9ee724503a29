"""Sizes of GGUF files: those that people publish, and those that llama-quantize says it would
write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import resolve
from ullage.specs.gguf import GGUFHeader, GGUFTensor
from ullage.specs.gguf_mixtures import MIXTURES
from ullage.specs.gguf_quant import as_gguf, as_stored, is_gguf
from ullage.specs.sources import catalog
from ullage.units import MIB

SMALL = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m")


def size(name: str, file_type: str) -> int:
    return as_gguf(resolve(name), file_type).weights_bytes("fp32")


@pytest.mark.parametrize(
    ("file_type", "gigabytes"),
    [
        ("q8_0", 8.54),
        ("q6_k", 6.60),
        ("q5_k_m", 5.73),
        ("q5_k_s", 5.60),
        ("q4_k_m", 4.92),
        ("q4_k_s", 4.69),
        ("q4_0", 4.66),
        ("iq4_xs", 4.45),
        ("q3_k_l", 4.32),
        ("q3_k_m", 4.02),
        ("q3_k_s", 3.66),
        ("iq3_m", 3.78),
        ("q2_k", 3.18),
    ],
)
def test_published_files_of_llama_8b(file_type: str, gigabytes: float) -> None:
    """The table of huggingface.co/bartowski/Meta-Llama-3.1-8B-Instruct-GGUF. Metadata with the
    vocabulary takes 8 MB of each file."""
    written = size("llama-3.1-8b", file_type) + 8e6
    assert written / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(
    ("name", "file_type", "gigabytes"),
    [
        ("gpt-oss-20b", "mxfp4", 12.1),  # huggingface.co/ggml-org/gpt-oss-20b-GGUF
        ("gpt-oss-120b", "mxfp4", 63.4),  # huggingface.co/ggml-org/gpt-oss-120b-GGUF
        ("gpt-oss-20b", "fp16", 13.8),  # huggingface.co/unsloth/gpt-oss-20b-GGUF
        ("gpt-oss-20b", "q4_k_m", 11.6),
        ("llama-3.3-70b", "q4_k_m", 42.5),  # huggingface.co/bartowski/Llama-3.3-70B-Instruct-GGUF
        ("deepseek-v3", "q4_k_m", 404.4),  # huggingface.co/bartowski/deepseek-ai_DeepSeek-V3-GGUF
    ],
)
def test_published_files_of_others(name: str, file_type: str, gigabytes: float) -> None:
    assert size(name, file_type) / 1e9 == pytest.approx(gigabytes, rel=0.004)


# MiB by `llama-quantize --dry-run MODEL-F16.gguf TYPE` of b11434, on files of these geometries.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-3.1-8b", (3024.38, 3825.27, 4467.80, 4685.30)),
        ("llama-3.1-70b", (25145.77, 32672.53, 38470.61, 40543.11)),
        ("qwen3-1.7b", (736.09, 890.34, 1005.40, 1050.43)),
        ("qwen2.5-0.5b", (317.25, 333.33, 361.94, 373.71)),  # 896 columns: no multiple of 256
        ("gemma-3-12b", (4541.08, 5724.21, 6607.80, 6956.32)),
        ("mixtral-8x7b", (16508.57, 21501.27, 25505.87, 27129.87)),
    ],
)
def test_the_rules_are_llama_quantizes(name: str, sizes: tuple[float, ...]) -> None:
    planned = [size(name, file_type) / MIB for file_type in SMALL]
    assert planned == pytest.approx(sizes, abs=0.006)


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        ("qwen3-next-80b-a3b", 46162.80),
        ("nemotron-3-nano-30b-a3b", 23371.92),  # experts of 1856 columns
        ("qwen3-30b-a3b", 17691.34),
        ("deepseek-v2-lite", 9883.84),
        ("deepseek-v3", 385750.62),
        ("qwen3.5-27b", 15770.35),
    ],
)
def test_q4_k_m_of_experts_latents_and_hybrids(name: str, mebibytes: float) -> None:
    assert size(name, "q4_k_m") / MIB == pytest.approx(mebibytes, abs=0.006)


@pytest.mark.parametrize(
    ("file_type", "bits"),
    [
        ("iq1_s", 2.0042),
        ("iq1_m", 2.1460),
        ("iq2_xxs", 2.3824),
        ("iq2_xs", 2.5882),
        ("iq2_s", 2.7403),
        ("iq2_m", 2.9294),
        ("iq3_xxs", 3.2548),
        ("iq3_xs", 3.4977),
        ("iq3_s", 3.6606),
        ("iq3_m", 3.7628),
        ("q2_k_s", 2.9697),
        ("q2_k", 3.1593),
        ("q3_k_s", 3.6429),
        ("q5_k_m", 5.7036),
    ],
)
def test_published_bits_a_weight_of_llama_8b(file_type: str, bits: float) -> None:
    """The table of llama.cpp's tools/quantize/README.md."""
    spec = as_gguf(resolve("llama-3.1-8b"), file_type)
    assert round(spec.weights_bytes("fp32") * 8 / spec.parameters, 4) == bits


# Bytes of a block of 256 numbers.
Q2_K, Q4_K, Q5_K, Q6_K, IQ1_S, IQ2_XXS, TQ1_0 = 84, 144, 176, 210, 50, 66, 54


def blocks(rows: int, columns: int = 4096) -> int:
    return rows * columns // 256


NORMS = 65 * 4096 * 4  # in fp32: two a layer and the last one


def test_iq1_s_of_llama_8b_by_hand() -> None:
    """32 layers; values of 4 groups in Q4_K, attention's output in IQ2_XXS, the first 4 down
    projections in Q2_K, the embedding in Q2_K, the head in Q5_K."""
    layer = (
        (blocks(4096) + blocks(1024)) * IQ1_S  # q, k
        + blocks(1024) * Q4_K
        + blocks(4096) * IQ2_XXS
        + 2 * blocks(14336) * IQ1_S  # gate, up
    )
    down = blocks(4096, 14336) * (4 * Q2_K + 28 * IQ1_S)
    ends = blocks(128256) * (Q2_K + Q5_K)
    assert size("llama-3.1-8b", "iq1_s") == 32 * layer + down + ends + NORMS


def test_tq1_0_of_llama_8b_by_hand() -> None:
    """All layers alike; the embedding in Q4_K, the head in Q6_K."""
    numbers = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    ends = blocks(128256) * (Q4_K + Q6_K)
    assert size("llama-3.1-8b", "tq1_0") == 32 * numbers // 256 * TQ1_0 + ends + NORMS


def types(name: str, file_type: str, part: str) -> dict[str, int]:
    """How many layers have `part` in each type."""
    found: dict[str, int] = {}
    for tensor in as_gguf(resolve(name), file_type).tensors:
        if part in tensor.name:
            assert tensor.storage is not None
            kind = tensor.storage.name
            found[kind] = found.get(kind, 0) + len(tensor.layers)
    return found


@pytest.mark.parametrize(
    ("name", "file_type", "part", "layers"),
    [
        ("mixtral-8x7b", "iq2_xs", "v_proj", {"Q4_K": 32}),
        ("mixtral-8x7b", "iq2_xs", "k_proj", {"Q4_K": 32}),
        ("mixtral-8x7b", "iq2_xs", "o_proj", {"Q5_K": 32}),
        ("mixtral-8x7b", "iq2_xs", "q_proj", {"IQ2_XS": 32}),
        ("mixtral-8x7b", "q2_k_s", "o_proj", {"Q2_K": 32}),
        ("llama-3.1-70b", "iq2_m", "v_proj", {"Q4_K": 80}),  # the 70B has no rule of its own here
        ("llama-3.1-70b", "iq3_xxs", "v_proj", {"Q5_K": 80}),
        ("llama-2-7b", "iq2_s", "v_proj", {"IQ3_S": 32}),  # a KV head to each query head
        ("llama-2-7b", "iq2_xxs", "v_proj", {"Q2_K": 32}),
        ("llama-2-7b", "iq3_xxs", "v_proj", {"IQ3_XXS": 32}),
        ("llama-2-7b", "iq3_xs", "up_proj", {"IQ3_S": 8, "IQ3_XXS": 24}),
        # 48 layers, the first six of whose down projections are experts'
        ("qwen3-30b-a3b", "iq1_m", "down_proj", {"Q2_K": 6, "IQ1_M": 42}),
        # 27 layers, the first of them dense: one tensor, whose 10,944 columns no block of 256
        # divides, then two a layer, of which three tensors are first
        ("deepseek-v2-lite", "iq2_xxs", "layers.{}.mlp.down_proj", {"Q4_0": 1}),
        ("deepseek-v2-lite", "iq2_xxs", "shared_experts.down_proj", {"Q2_K": 1, "IQ2_XXS": 25}),
    ],
)
def test_the_lowest_types_give_more_to_a_few(
    name: str, file_type: str, part: str, layers: dict[str, int]
) -> None:
    assert types(name, file_type, part) == layers


def test_what_no_block_divides_gets_a_type_of_32() -> None:
    """896 columns: IQ4_NL for the IQ types, Q4_0 for the ternary ones."""
    assert set(types("qwen2.5-0.5b", "iq2_xs", "up_proj")) == {"IQ4_NL"}
    assert set(types("qwen2.5-0.5b", "tq2_0", "up_proj")) == {"Q4_0"}


@given(st.sampled_from(sorted(catalog())), st.sampled_from(sorted(MIXTURES)))
def test_every_number_keeps_its_place(name: str, file_type: str) -> None:
    before = resolve(name)
    after = as_gguf(before, file_type)
    assert is_gguf(after)
    assert not is_gguf(before)
    assert after.parameters == before.parameters
    assert as_gguf(after, file_type) == after


@given(st.sampled_from(sorted(catalog())))
def test_wider_types_take_more(name: str) -> None:
    file_types = ("iq1_s", "iq2_xs", "q2_k", "q4_k_m", "q8_0", "fp16", "fp32")
    sizes = [size(name, file_type) for file_type in file_types]
    assert sizes == sorted(sizes)


def test_a_file_is_taken_as_it_is() -> None:
    tensors = (
        GGUFTensor("token_embd.weight", (50, 256), "Q4_K", 0, 7200),
        GGUFTensor("blk.0.attn_norm.weight", (256,), "F32", 7200, 1024),
        GGUFTensor("output.weight", (50, 256), "Q6_K", 8224, 10500),
    )
    spec = as_stored(resolve("llama-3.1-8b"), GGUFHeader(3, {}, tensors))
    assert is_gguf(spec)
    assert spec.weights_bytes("fp32") == 7200 + 1024 + 10500
    assert [tensor.role for tensor in spec.tensors] == ["embedding", "other", "head"]
