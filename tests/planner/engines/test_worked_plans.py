"""One small request on every engine, every line worked by hand.

A llama of hidden 32, MLP 48, 4 heads of 8 with 2 KV heads, 2 layers, 64 words: 19,616 parameters
(2,048 of embedding and of head, 7,744 a layer, 32 of the last norm), 32 KV numbers a token and
layer. Three sequences of 100 + 10 tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ullage import ModelSpec, Plan, Recipe, Workload, build_plan, default_execution
from ullage.planner.engines import ENGINES
from ullage.planner.memory import explain
from ullage.specs.device import Device, find_device
from ullage.specs.workload import Engine, PhaseName
from ullage.units import GIB

TinySpec = Callable[..., ModelSpec]
Planned = Callable[..., Plan]
CPU, CARD = Device("cpu", "cpu", 16 * GIB), Device("card", "cuda", 24 * GIB)
MAC = Device("mac", "mps", 24 * GIB)
PARAMETERS = 19_616
WORK = Workload(100, 10, 3)


@pytest.fixture
def planned(tiny_spec: TinySpec) -> Planned:
    def make(engine: Engine, device: Device = CARD, **told: Any) -> Plan:
        execution = replace(default_execution(device, engine), **told)
        return build_plan(Recipe(tiny_spec("llama"), device, WORK, execution))

    return make


def lines(plan: Plan, phase: PhaseName) -> dict[str, int]:
    """Bytes by what they are, without those that are 0."""
    found = {term.what: term.nbytes for term in explain(plan.recipe, phase)}
    return {what: nbytes for what, nbytes in found.items() if nbytes}


FP32 = {"dtype": "fp32", "kv_dtype": "fp32"}


def test_ullage_on_a_cpu(planned: Planned) -> None:
    """110 tokens are seven blocks of 16. Attention stands 1,600 B above the MLP: 100 x 208 numbers
    of its layer, two outputs of 3,200 and five of 400 rows, all in fp32, less 100 x 288. A token
    for each of three sequences has no output beside the kernel's: 3 x 176 numbers, what each
    leaves, its joined output and its tile's, of 32 each, and five of 12 rows."""
    plan = planned("ullage", CPU)
    held = {
        "weights in fp32": PARAMETERS * 4,
        "runtime": 434_000_000,
        "KV blocks in fp32": 3 * 2 * 7 * 16 * 32 * 4,
        "logits of the last token": 3 * 64 * 8,
    }
    above = (100 * 208 + 2 * 3200 + 5 * 400 - 100 * 288) * 4
    assert above == 1600
    assert lines(plan, "load") == {"weights in fp32": PARAMETERS * 4, "runtime": 434_000_000}
    assert lines(plan, "prefill") == held | {
        "hidden states of one layer": 100 * 288 * 4,
        "scratch of attention": above,
    }
    assert lines(plan, "decode") == held | {
        "hidden states of one layer": 3 * 288 * 4,
        "scratch of attention": (3 * 176 + 3 * 3 * 32 + 5 * 12 - 3 * 288) * 4,
    }


def test_ullage_on_a_card_joins_splits(tiny_spec: TinySpec) -> None:
    """Each KV head has 2 x 246 rows, and 256 entries: two splits by the bound and its last one for
    each of the two. Nine numbers in fp32 a row, the joined output, and 91 integers of work."""
    execution = default_execution(CARD, "ullage")
    execution = replace(execution, dtype="fp32", kv_dtype="fp32")
    plan = build_plan(Recipe(tiny_spec("llama"), CARD, Workload(246, 10), execution))
    kernel = 492 * (2 + 2) * 9 * 4 + 4 * 246 * 8 * 4 + 91 * 8
    found = lines(plan, "prefill")
    assert found["scratch of attention"] == 246 * 208 * 4 + kernel - 246 * 288 * 4
    assert found["margin for the allocator"] == 64 << 20


def test_ullage_on_a_mac_scores_in_tiles(planned: Planned) -> None:
    """400 rows x (2 outputs of 8 + 5) and 400 x 110 scores in fp32, a byte of mask for each of
    100 x 110, beside 100 x 208 numbers of the layer."""
    plan = planned("ullage", MAC, **FP32)
    kernel = 400 * 21 * 4 + 400 * 110 * 4 + 100 * 110
    found = lines(plan, "prefill")
    assert found["scratch of attention"] == 100 * 208 * 4 + kernel - 100 * 288 * 4
    narrow = lines(planned("ullage", MAC, dtype="fp32", kv_dtype="bf16"), "prefill")
    # what is stored in bf16 is read through a tile of keys in fp32, and new entries are rounded
    more = 110 * 16 * 4 + 100 * 32 * 2
    assert narrow["scratch of attention"] == found["scratch of attention"] + more


def test_transformers_reads_all_prompts_at_once(planned: Planned) -> None:
    """The last token out is never fed back: 109 are held in the end. A layer's K is copied."""
    plan = planned("transformers", CPU)
    always = {
        "weights in fp32": PARAMETERS * 4,
        "runtime": 416_000_000,
        "logits of the last token": 3 * 64 * 8,
    }
    assert lines(plan, "prefill") == always | {
        "DynamicCache in fp32": 3 * 100 * 2 * 32 * 4,
        "hidden states of one layer": 300 * 288 * 4,
        "one layer's K copied to append": 3 * 100 * 16 * 4,
    }
    assert lines(plan, "decode") == always | {
        "DynamicCache in fp32": 3 * 109 * 2 * 32 * 4,
        "hidden states of one layer": 3 * 288 * 4,
        "one layer's K copied to append": 3 * 109 * 16 * 4,
    }


def test_transformers_with_a_score_matrix(planned: Planned) -> None:
    """4 heads x 300 x 100 scores and their softmax, a mask, K and V for all query heads."""
    found = lines(planned("transformers", CPU, attention="eager"), "prefill")
    scores = 4 * 300 * 100 * 8 + 300 * 100 * 4 + 3 * 100 * 64 * 4
    assert found["score matrix, its softmax and mask"] == scores


def test_a_later_chunk_of_transformers_needs_a_mask(planned: Planned) -> None:
    """30 new rows against 100, a byte and a number each, and K and V for all query heads."""
    found = lines(planned("transformers", CPU, prefill_chunk=10), "prefill")
    assert found["one layer's K copied to append"] == 30 * 100 * 5 + 3 * 100 * 64 * 4


def test_vllm(planned: Planned) -> None:
    """2,048 tokens in a step. A block is 16 x 32 numbers x 2 layers in bf16; seven a sequence."""
    plan = planned("vllm", engine_version="0.19.0")
    loaded = {
        "weights": PARAMETERS * 2,
        "cosines and sines": 256 * 8 * 2,
        "outside of torch": 268_435_456,
    }
    profile = {
        "profile peak: forward pass": 2048 * (144 + 112) * 2,
        "buffers of the model runner": 53_687_091,
    }
    assert lines(plan, "load") == loaded
    assert lines(plan, "decode") == loaded | profile | {"KV blocks in bf16": 3 * 7 * 2048}
    assert lines(plan, "prefill") == lines(plan, "decode")


def test_the_pool_of_vllm(planned: Planned) -> None:
    """0.9 of the card less all that is beside KV entries; in 0.19 graphs are not among it."""
    share = planned("vllm", engine_version="0.19.0").share
    beside = PARAMETERS * 2 + 4096 + 268_435_456 + 1_048_576 + 53_687_091
    assert share.kv_pool_bytes == int(24 * GIB * 0.9) - beside
    assert share.kv_pool_tokens == share.kv_pool_bytes // 2048 * 16
    assert share.max_concurrency == round(share.kv_pool_bytes // 2048 / 7, 2)
    # 512 tokens are the most that is captured: 62 x 32 and 7.97 x 48 numbers each
    assert share.graph_bytes == int(168_577_466 + 2 * 12_025_908 + 512 * (1984 + 382.56) * 2)


@pytest.mark.parametrize(("version", "tokens_a_block"), [("0.20.0", 16), ("0.21.0", 110 / 7)])
def test_a_pool_is_counted_as_the_versions_log_counts_it(
    planned: Planned, version: str, tokens_a_block: float
) -> None:
    """In blocks, later in sequences of the planned length."""
    share = planned("vllm", engine_version=version).share
    assert share.kv_pool_tokens == int(share.kv_pool_bytes // 2048 * tokens_a_block)


def test_sglang(planned: Planned) -> None:
    """Half of the card, and half of what the device context takes."""
    plan = planned("sglang", utilization=0.5)
    assert plan.budget_bytes == 12 * GIB
    loaded = {
        "weights": PARAMETERS * 2,
        "cosines and sines": 256 * 8 * 2,
        "device context": 644_245_094 // 2,
    }
    assert lines(plan, "load") == loaded
    assert lines(plan, "decode") == loaded | {"KV pool in bf16": 3 * 110 * 2 * 32 * 2}


@pytest.mark.parametrize(
    ("told", "sizes", "reserved_mib"),
    [
        # a chunk of 4,096 is captured at 8 + 14 + 8 + 8 + 12 sizes, 8 MiB each; 48 sequences
        ({}, 50, 512 + 1.5 * 4096 + 128 + 2 * 48),
        # with four devices graphs are for 160 sequences, and buffers for each device
        ({"tensor_parallel": 4}, 50, 512 + 1.5 * 4096 + 4 * 128 + 2 * 160),
        ({"prefill_chunk": 48}, 9, 512 + 1.5 * 2048 + 128 + 2 * 48),  # reserved as if 2,048
        ({"prefill_chunk": 8192, "max_num_seqs": 7}, 58, 512 + 1.5 * 8192 + 128 + 2 * 7),
    ],
)
def test_the_static_share_of_sglang(
    tiny_spec: TinySpec, told: dict[str, Any], sizes: int, reserved_mib: float
) -> None:
    card = find_device("rtx-4090")  # 24,207 MiB
    execution = replace(default_execution(card, "sglang"), **told)
    spec = tiny_spec("llama")
    settled = ENGINES["sglang"].settle(Recipe(spec, card, WORK, execution)).execution
    left_mib = 24_207 - reserved_mib - 8 * sizes
    assert settled.utilization == round(left_mib / 24_207, 3)


@pytest.mark.parametrize(("kv_dtype", "bits"), [("fp16", 16), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_llama_cpp(planned: Planned, kv_dtype: str, bits: float) -> None:
    """110 tokens have 256 cells; a micro-batch is 512. The MLP is the highest: 5 x 32 + 3 x 48."""
    found = lines(planned("llama.cpp", CPU, kv_dtype=kv_dtype), "decode")
    del found["model buffer"]
    assert found == {
        "runtime": 100_663_296,
        f"KV cache in {kv_dtype}": 3 * 256 * 2 * 32 * bits / 8,
        "attention masks": 256 * 512 * 2,
        "compute buffer, MLP": 4 * 512 * 304,
        "input of a matrix product": 512 * 48 * 2,
    }


def test_llama_cpp_without_flash_attention(planned: Planned) -> None:
    """A token's 3 x 32 + 3 x 32 + 2 x 16 numbers and its scores, 4 heads x 256 cells; the mask in
    fp32."""
    found = lines(planned("llama.cpp", CPU, attention="eager"), "load")
    assert found["compute buffer, attention"] == 4 * 512 * (224 + 1024)
    assert found["attention masks"] == 256 * 512 * 4


def test_llama_cpp_on_a_card_widens_what_is_narrow(planned: Planned) -> None:
    """One layer's filled cells in fp16, and nothing where they are fp16 already."""
    found = lines(planned("llama.cpp", kv_dtype="q8_0"), "decode")
    assert found["scratch of flash attention"] == 3 * 256 * 32 * 2
    assert "scratch of flash attention" not in lines(planned("llama.cpp"), "decode")
    assert "scratch of flash attention" not in lines(
        planned("llama.cpp", kv_dtype="q8_0", attention="eager"), "decode"
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_is_the_sum_of_its_lines(planned: Planned, engine: Engine) -> None:
    plan = planned(engine)
    for phase, part in plan.phases.items():
        assert sum(lines(plan, phase).values()) == part.total_bytes
