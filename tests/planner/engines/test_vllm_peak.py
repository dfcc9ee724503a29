"""vLLM's profile of its peak, worked by hand on a tiny llama: hidden 32, MLP 48, 4 heads of 8 with
2 KV heads, 2 layers, 64 words."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import ModelSpec, Recipe, Workload, find_device, resolve
from ullage.planner.constants import Constants
from ullage.planner.engines.shards import Stage, stages
from ullage.planner.engines.vllm_peak import peak_terms
from ullage.specs.footprint import Term
from ullage.specs.quantized import as_checkpoint
from ullage.specs.workload import Execution

TinySpec = Callable[..., ModelSpec]
H100 = find_device("h100")
SMALL = {"prefill_chunk": 64, "max_num_seqs": 8}
FIXED = 53_687_091


def terms_of(model: ModelSpec, stage: Stage | None = None, **told: Any) -> dict[str, Term]:
    settings = {"engine_version": "0.19.0", **SMALL, **told}
    execution = Execution(engine="vllm", attention="flash", **settings)
    constants = Constants(Recipe(model, H100, Workload(100, 10), execution))
    terms = peak_terms(model, execution, stage or stages(model.num_layers, 1)[0], constants)
    return {term.what: term for term in terms}


def test_the_forward_pass_is_the_mlp_beside_the_hidden_states(tiny_spec: TinySpec) -> None:
    """64 tokens x (3 x 48 numbers of the MLP + 3.5 x 32 hidden ones) x 2 B."""
    terms = terms_of(tiny_spec("llama"))
    assert terms["profile peak: forward pass"].nbytes == 64 * (144 + 112) * 2 == 32_768
    assert terms["buffers of the model runner"].nbytes == FIXED
    assert len(terms) == 2


def test_attention_counts_where_it_is_wider_than_the_mlp(tiny_spec: TinySpec) -> None:
    """64 x ((4 + 4 + 2 + 2) heads x 8 + 112) x 2 B: an MLP of 8 is three times 8 numbers."""
    terms = terms_of(tiny_spec("llama", intermediate_size=8))
    assert terms["profile peak: forward pass"].nbytes == 64 * (96 + 112) * 2


def test_two_devices_halve_the_layer_and_not_the_hidden_states(tiny_spec: TinySpec) -> None:
    terms = terms_of(tiny_spec("llama"), tensor_parallel=2)
    assert terms["profile peak: forward pass"].nbytes == 64 * (72 + 112) * 2


def test_between_ranks_hidden_states_and_residual_are_handed_on(tiny_spec: TinySpec) -> None:
    terms = terms_of(tiny_spec("llama"), stages(2, 2)[0], max_num_seqs=64)
    assert terms["profile peak: forward pass"].nbytes == 64 * (144 + 112 + 2 * 32) * 2
    assert "profile peak: sampler" not in terms  # which the last rank has


@pytest.mark.parametrize(
    ("version", "nbytes"),
    [
        # 64 words x 64 rows x (2 + 36) B, and 64 hidden states of 32 x 2 B
        ("0.16.0", 64 * 64 * 38 + 64 * 32 * 2),
        # 12 B in place of 36, and 64 rows of fp32 that top-k scratches on: there are 132 at most
        ("0.19.0", 64 * (64 * 14 + 64 * 4) + 64 * 32 * 2),
    ],
)
def test_the_sampler_of_many_sequences(tiny_spec: TinySpec, version: str, nbytes: int) -> None:
    terms = terms_of(tiny_spec("llama"), max_num_seqs=64, engine_version=version)
    assert terms["profile peak: sampler"].nbytes == nbytes
    assert terms["profile peak: sampler"].part == "logits"


def test_there_are_no_more_rows_than_tokens_in_a_step(tiny_spec: TinySpec) -> None:
    few, many = (terms_of(tiny_spec("llama"), max_num_seqs=n) for n in (64, 6400))
    assert few == many


def test_top_k_scratches_on_132_rows_at_most(tiny_spec: TinySpec) -> None:
    told = {"max_num_seqs": 1000, "prefill_chunk": 1000}
    sampler = terms_of(tiny_spec("llama"), **told)["profile peak: sampler"]
    assert sampler.nbytes == 64 * (1000 * 14 + 132 * 4) + 1000 * 32 * 2


def test_8_bit_weights_multiply_8_bit_inputs(tiny_spec: TinySpec) -> None:
    """One byte more for each of the MLP's 48 numbers."""
    fp8 = as_checkpoint(tiny_spec("llama"), "fp8")
    assert terms_of(fp8)["profile peak: forward pass"].nbytes == 64 * (144 + 112) * 2 + 64 * 48


def test_experts_have_two_buffers_that_stay() -> None:
    """8,192 tokens x 8 experts; hidden 2,048 is wider than an expert's 768, and than twice it."""
    model = resolve("qwen3-30b-a3b")
    told = {"prefill_chunk": 8192, "max_num_seqs": 1024}
    workspace = "workspace of the experts"
    assert terms_of(model, **told)[workspace].nbytes == 8192 * 8 * (2048 + 2048) * 2
    assert terms_of(model, **told, engine_version="0.12.0")[workspace].nbytes == 0
    assert terms_of(resolve("gpt-oss-20b"), **told)[workspace].nbytes == 0  # fused in mxfp4


def test_images_fill_a_step_on_the_first_rank_alone() -> None:
    """28 x 28 pixels x 3 colours x 2 B a token, and its embedding of 3,840 x 2 B."""
    model = resolve("gemma-3-12b")
    assert model.encoder
    first, last = (terms_of(model, stage) for stage in stages(48, 2))
    assert first["images of the profile"].nbytes == 64 * (4704 + 7680)
    assert "images of the profile" not in last


def test_latents_of_earlier_chunks_are_expanded() -> None:
    """64 Ki tokens x 16 heads x 192 numbers, K and V, in bf16; half of them on two devices."""
    model = resolve("deepseek-v2-lite")
    for split in (1, 2):
        forward = terms_of(model, tensor_parallel=split)["profile peak: forward pass"]
        expanded = (64 << 10) * 16 // split * 192 * 2 * 2
        attention = 64 * (4 * 16 // split) * 192 * 2
        assert forward.nbytes == expanded + attention + 64 * int(3.5 * 2048) * 2


@given(
    st.sampled_from(["llama-3.1-8b", "qwen3-30b-a3b", "gemma-3-12b", "deepseek-v2-lite"]),
    st.integers(1, 9000), st.integers(0, 9000), st.integers(1, 2000), st.integers(0, 2000),
    st.sampled_from(["0.10.0", "0.16.0", "0.19.0", "0.30.0"]),
)  # fmt: skip
def test_the_peak_never_falls_as_steps_grow(
    name: str, chunk: int, more: int, limit: int, others: int, version: str
) -> None:
    def peak(chunk: int, limit: int) -> int:
        told = {"prefill_chunk": chunk, "max_num_seqs": limit, "engine_version": version}
        return sum(term.nbytes for term in terms_of(resolve(name), **told).values())

    assert peak(chunk, limit) <= peak(chunk + more, limit) <= peak(chunk + more, limit + others)
