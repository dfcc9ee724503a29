"""Sizes of GGUF files: those that people publish, and those that llama-quantize says it would
write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import resolve
from ullage.specs.gguf import GGUFHeader, GGUFTensor
from ullage.specs.gguf_quant import MIXTURES, as_gguf, as_stored, is_gguf
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
    file_types = ("q2_k", "q4_k_m", "q8_0", "fp16", "fp32")
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
