"""What one of several devices holds: worked by hand on a tiny llama, and never less than its
part."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage import ModelSpec, resolve
from ullage.errors import InputError
from ullage.planner.engines.shards import (
    check_split,
    kept_heads,
    shard,
    stages,
    tower_bytes,
    weights_bytes,
)
from ullage.specs.model import TensorSpec
from ullage.specs.workload import Execution

TinySpec = Callable[..., ModelSpec]
MODELS = ("llama-3.1-8b", "gemma-2-9b", "qwen3-30b-a3b", "deepseek-v2-lite", "qwen3.5-27b")


@pytest.fixture
def llama(tiny_spec: TinySpec) -> ModelSpec:
    """Hidden 32, MLP 48, 4 heads of 8 with 2 KV heads, 2 layers, 100 words."""
    return tiny_spec("llama", vocab_size=100)


# Numbers in one layer. Whole: q and o 1,024, k and v 512, gate, up and down 1,536, norms 64.
WHOLE_LAYER = 2 * 1024 + 2 * 512 + 3 * 1536 + 64
# On two devices all of them are halved but the norms.
HALF_LAYER = 2 * 512 + 2 * 256 + 3 * 768 + 64
# On four there are two KV heads for four devices: each device has one, 8 x 32 numbers.
QUARTER_LAYER = 2 * 256 + 2 * 256 + 3 * 384 + 64


@pytest.mark.parametrize(
    ("split", "layer", "rows"),
    # 100 words are padded to 128 rows, of which every device has its part
    [(1, WHOLE_LAYER, 128), (2, HALF_LAYER, 64), (4, QUARTER_LAYER, 32)],
)
def test_a_tiny_llama_on_some_devices(llama: ModelSpec, split: int, layer: int, rows: int) -> None:
    numbers = 2 * layer + 2 * rows * 32 + 32  # embedding and head, the last norm
    held = weights_bytes(llama, "bf16", split, stages(2, 1)[0])
    assert held == 2 * numbers
    assert weights_bytes(llama, "fp32", split, stages(2, 1)[0]) == 4 * numbers


def test_the_first_rank_has_the_embedding_and_the_last_the_head(llama: ModelSpec) -> None:
    first, last = (weights_bytes(llama, "bf16", 1, stage) for stage in stages(2, 2))
    assert first == 2 * (WHOLE_LAYER + 128 * 32)
    assert last == 2 * (WHOLE_LAYER + 128 * 32 + 32)


def test_a_tied_embedding_is_held_at_both_ends(tiny_spec: TinySpec) -> None:
    tied = tiny_spec("llama", vocab_size=100, tie_word_embeddings=True)
    first, last = (weights_bytes(tied, "bf16", 1, stage) for stage in stages(2, 2))
    assert last - first == 2 * 32  # the last norm is all that is between them
    assert weights_bytes(tied, "bf16", 1, stages(2, 1)[0]) == 2 * (2 * WHOLE_LAYER + 128 * 32 + 32)


def test_a_fused_projection_keeps_a_whole_kv_head(tiny_spec: TinySpec) -> None:
    phi = tiny_spec("phi3")
    (fused,) = (tensor for tensor in phi.tensors if "qkv_proj" in tensor.name)
    # 4 query heads and two of each kind of KV head, 8 rows each
    assert [shard(phi, fused, split).shape[0] for split in (1, 2, 4)] == [
        8 * (4 + 2 * 2), 8 * (2 + 2 * 1), 8 * (1 + 2 * 1),
    ]  # fmt: skip


def test_what_every_device_computes_whole_is_not_split() -> None:
    model = resolve("deepseek-v2-lite")
    for tensor in model.tensors:
        if "kv_a_proj_with_mqa" in tensor.name or tensor.name.endswith("mlp.gate.weight"):
            assert shard(model, tensor, 4).shape == tensor.shape
        if tensor.name.endswith("o_proj.weight"):  # its input is split: columns
            assert shard(model, tensor, 4).shape == (tensor.shape[0], tensor.shape[1] // 4)


def test_of_a_tower_projections_are_split_and_embeddings_are_not() -> None:
    tower = [
        TensorSpec("tower.{}.fc1.weight", (400, 100), "other", (0, 1)),
        TensorSpec("tower.position_embedding.weight", (64, 100), "other"),
        TensorSpec("tower.norm.weight", (100,), "other"),
    ]
    assert tower_bytes(tower, "bf16", 1) == 2 * (2 * 40_000 + 6400 + 100)
    assert tower_bytes(tower, "bf16", 4) == 2 * (2 * 10_000 + 6400 + 100)


@given(st.integers(1, 200), st.data())
def test_every_layer_is_on_one_rank(layers: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, layers))
    found = stages(layers, depth)
    assert [layer for stage in found for layer in stage.layers] == list(range(layers))
    sizes = [len(stage.layers) for stage in found]
    assert max(sizes) - min(sizes) <= 1
    assert [stage.first for stage in found] == [True] + [False] * (depth - 1)
    assert [stage.last for stage in found] == [False] * (depth - 1) + [True]


def test_what_does_not_divide_goes_to_the_last_ranks_but_one() -> None:
    # vllm/distributed/utils.py, get_pp_indices: 26 layers on four ranks are 6 + 7 + 7 + 6
    assert [len(stage.layers) for stage in stages(26, 4)] == [6, 7, 7, 6]


@settings(max_examples=40)
@given(st.sampled_from(MODELS), st.sampled_from([1, 2, 4]), st.integers(1, 6))
def test_devices_together_hold_at_least_the_model(name: str, split: int, depth: int) -> None:
    model = resolve(name)
    held = [weights_bytes(model, "bf16", split, s) for s in stages(model.num_layers, depth)]
    assert split * sum(held) >= model.weights_bytes("bf16")
    alone = weights_bytes(model, "bf16", 1, stages(model.num_layers, 1)[0])
    assert max(held) <= alone
    # what is held more than once is little: a fifth at most in these models
    assert split * sum(held) < 1.2 * alone


@given(st.integers(1, 64), st.integers(1, 64))
def test_no_device_is_without_a_kv_head(heads: int, split: int) -> None:
    kept = kept_heads(heads, split)
    assert kept >= 1
    assert kept * split >= heads
    assert kept == 1 or (kept - 1) * split < heads


@pytest.mark.parametrize(
    ("split", "depth", "says"),
    [
        (3, 1, "4 attention heads: --tp 3 does not divide"),
        (8, 1, "does not divide"),
        (0, 1, "1 or more"),
        (1, 0, "1 or more"),
        (1, 3, "2 layers, too few for --pp 3"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    llama: ModelSpec, split: int, depth: int, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check_split(llama, Execution(tensor_parallel=split, pipeline_parallel=depth))


def test_kv_heads_may_be_held_twice_but_not_cut(tiny_spec: TinySpec) -> None:
    check_split(tiny_spec("llama"), Execution(tensor_parallel=4))  # two devices a KV head
    uneven = tiny_spec("llama", num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    with pytest.raises(InputError, match="4 KV heads: --tp 6 neither divides"):
        check_split(uneven, Execution(tensor_parallel=6))
