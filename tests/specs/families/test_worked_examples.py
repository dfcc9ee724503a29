"""Published models by hand: what their authors count, and every byte of a sequence."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from family_cases import CASES, GEMMA4_TYPES, case

from ullage.errors import ModelError
from ullage.specs.blocks import sequence_bytes
from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec, TensorSpec
from ullage.specs.sources import resolve
from ullage.units import GIB

ENDS = ("embedding", "head")


class Published(NamedTuple):
    """Billions of parameters as the authors state them, and the roles that they leave out of those
    which a token goes through."""

    total: float
    active: float
    left_out: tuple[str, ...] = ()
    encoder: bool = False


# Half of the last digit that is stated is what a figure may be off.
CARDS: Mapping[str, Published] = {
    "mixtral-8x7b": Published(46.7, 12.9),
    "mixtral-8x22b": Published(140.6, 39.2),
    "qwen3-30b-a3b": Published(30.5, 3.35),
    "qwen3-235b-a22b": Published(235.1, 22.2),
    "qwen3-coder-480b-a35b": Published(480.2, 35.5),
    "qwen1.5-moe-a2.7b": Published(14.3, 2.7),
    "deepseek-v2-lite": Published(15.7, 2.45, ("embedding",)),  # its card says 2.4B
    "deepseek-v2": Published(235.7, 21.4),
    "deepseek-v3": Published(671.0, 36.6, ("embedding",)),
    "kimi-k2": Published(1026.4, 31.7, ("embedding",)),
    # the model card's table: "active parameters" leave the embedding out and count the head
    "gpt-oss-20b": Published(20.91, 3.61, ("embedding",)),
    "gpt-oss-120b": Published(116.83, 5.13, ("embedding",)),
    # 355B and 106B with the layer that predicts ahead, which is not loaded; 32B and 12B without
    # both ends
    "glm-4.5": Published(352.8, 32.1, ENDS),
    "glm-4.5-air": Published(106.9, 12.2, ENDS),
    "minimax-m2.5": Published(228.7, 9.8, ENDS),
    # the card's 3.2B is without the embedding, its 3.6B with it
    "nemotron-3-nano-30b-a3b": Published(31.6, 3.6),
    "gemma-4-26b-a4b": Published(25.2, 3.8),
    "gemma-4-31b": Published(30.7, 30.7),
    "phi-3.5-moe": Published(41.9, 6.6),
    # 109B and 402B with the vision tower
    "llama-4-scout": Published(108.6, 17.2, encoder=True),
    "llama-4-maverick": Published(401.6, 17.2, encoder=True),
}


def numbers(tensors: tuple[TensorSpec, ...], *roles: str) -> int:
    return sum(t.elements * t.count for t in tensors if not roles or t.role in roles)


@pytest.mark.parametrize("name", CARDS)
def test_totals_and_active_parameters_as_authors_count_them(name: str) -> None:
    spec, card = resolve(name), CARDS[name]
    total = spec.parameters + (numbers(spec.encoder) if card.encoder else 0)
    left_out = numbers(spec.tensors, *card.left_out) if card.left_out else 0
    assert total / 1e9 == pytest.approx(card.total, abs=0.06)
    assert (spec.active_parameters - left_out) / 1e9 == pytest.approx(card.active, abs=0.051)


def test_mixtral_weight_by_weight() -> None:
    spec = resolve("mixtral-8x7b")
    # q and o are 4,096 wide, k and v 8 heads of 128; three matrices an expert
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    expert = 3 * 14_336 * 4096
    rest = 32 * (8 * 4096 + 2 * 4096) + 4096  # routers and norms
    ends = 2 * 32_000 * 4096
    assert numbers(spec.tensors, "linear") == attention
    assert numbers(spec.tensors, "expert") == 32 * 8 * expert
    assert numbers(spec.tensors, "other") == rest
    assert spec.active_parameters == attention + 32 * 2 * expert + rest + ends
    assert spec.parameters == attention + 32 * 8 * expert + rest + ends


def test_deepseek_v3_weight_by_weight() -> None:
    spec = resolve("deepseek-v3")
    # queries through 1,536; keys and values through a latent of 512 beside 64 rotary numbers
    queries = 1536 * 7168 + 1536 + 128 * (128 + 64) * 1536
    latent = (512 + 64) * 7168 + 512 + 128 * (128 + 128) * 512
    attention = queries + latent + 7168 * 128 * 128
    dense, expert = 3 * 18_432 * 7168, 3 * 2048 * 7168
    sparse = 257 * expert + 256 * 7168 + 256  # one shared, the router and its bias
    norms = 61 * 2 * 7168 + 7168
    ends = 2 * 129_280 * 7168
    assert spec.parameters == 61 * attention + 3 * dense + 58 * sparse + norms + ends
    assert spec.parameters - spec.active_parameters == 58 * (256 - 8) * expert


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = (
        spec_from_config(case("llama", tie_word_embeddings=flag)) for flag in (True, False)
    )
    assert untied.parameters - tied.parameters == 100 * 64
    assert [t.name for t in untied.tensors if t not in tied.tensors] == ["lm_head.weight"]
    assert not [t for t in tied.tensors if t.role == "head"]


class Kept(NamedTuple):
    """A sequence's tokens, and the bytes of it in bf16, window by window."""

    tokens: int
    grown: int
    state: int = 0


KEPT: Mapping[str, Kept] = {
    # 2 x 8 heads x 128, 32 layers, 2 bytes
    "llama-3.1-8b": Kept(4096, 32 * 2 * 8 * 128 * 2 * 4096),
    # every layer slides
    "mistral-7b-v0.1": Kept(32_768, 32 * 2 * 8 * 128 * 2 * 4096),
    # every second layer of 24 slides at 128; 8 heads of 64
    "gpt-oss-20b": Kept(8192, 12 * 2 * 8 * 64 * 2 * (8192 + 128)),
    # every second of 42; 8 heads of 256
    "gemma-2-9b": Kept(8192, 21 * 2 * 8 * 256 * 2 * (8192 + 4096)),
    # 10 of 62 layers see everything; 16 heads of 128
    "gemma-3-27b": Kept(32_768, 2 * 16 * 128 * 2 * (10 * 32_768 + 52 * 1024)),
    # 5 of 30 see everything, with 2 heads of 512; 25 slide, with 8 of 256
    "gemma-4-26b-a4b": Kept(16_384, 2 * 2 * (5 * 2 * 512 * 16_384 + 25 * 8 * 256 * 1024)),
    # 12 of 48 see everything, the others chunks of 8,192
    "llama-4-scout": Kept(32_768, 2 * 8 * 128 * 2 * (12 * 32_768 + 36 * 8192)),
    "command-r7b": Kept(16_384, 2 * 8 * 128 * 2 * (8 * 16_384 + 24 * 4096)),
    "olmo-3-7b": Kept(16_384, 2 * 32 * 128 * 2 * (8 * 16_384 + 24 * 4096)),
    # a latent of 512 and 64 rotary numbers, for all heads
    "deepseek-v3": Kept(4096, 61 * (512 + 64) * 2 * 4096),
    # beside it, the indexer's key of 128: on every layer, or on 21 of 78
    "deepseek-v3.2": Kept(4096, 61 * (512 + 64 + 128) * 2 * 4096),
    "glm-5.2": Kept(4096, (78 * 576 + 21 * 128) * 2 * 4096),
    # keys of 192 and values of 128; 4 heads on 9 layers, 8 in a window on 39. The window of 128
    # and the query itself, in whole blocks of 16: 144
    "mimo-v2-flash": Kept(4096, 2 * (192 + 128) * (9 * 4 * 4096 + 39 * 8 * 144)),
    "minimax-m3": Kept(4096, 2 * (60 * 2 * 4 * 128 + 57 * 128) * 4096),
    "falcon-40b": Kept(2048, 60 * 2 * 8 * 64 * 2 * 2048),
    # 16 of 64 layers; 48 states of 48 heads x 128 x 128 in fp32, and 4 columns of a convolution
    "qwen3.5-27b": Kept(4096, 16 * 2 * 4 * 256 * 2 * 4096,
                        48 * (48 * 128 * 128 * 4 + (2 * 16 + 48) * 128 * 4 * 2)),
    "qwen3-next-80b-a3b": Kept(4096, 12 * 2 * 2 * 256 * 2 * 4096,
                               36 * (32 * 128 * 128 * 4 + (2 * 16 + 32) * 128 * 4 * 2)),
    # 6 of 52 layers; 23 Mamba states of 64 x 64 x 128, and 8 groups of B and C in the convolution
    "nemotron-3-nano-30b-a3b": Kept(4096, 6 * 2 * 2 * 128 * 2 * 4096,
                                    23 * (64 * 64 * 128 * 4 + (4096 + 2 * 8 * 128) * 4 * 2)),
    # 7 of 27 layers have a latent, 20 a state of 32 heads and three convolutions
    "kimi-linear-48b-a3b": Kept(4096, 7 * 576 * 2 * 4096,
                                20 * (32 * 128 * 128 * 4 + 3 * 32 * 128 * 4 * 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_bytes_of_a_sequence(name: str) -> None:
    spec, kept = resolve(name), KEPT[name]
    assert spec.state_bytes == kept.state
    assert sequence_bytes(spec, kept.tokens, "bf16") == kept.grown + kept.state


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gemma-3-4b", 4_300_079_472),
        ("gemma-3-12b", 12_187_325_040),
        ("gemma-3-27b", 27_432_406_640),
        ("mistral-small-3.1-24b", 24_011_361_280),
        ("qwen3-vl-2b", 2_127_532_032),
        ("qwen3-vl-4b", 4_437_815_808),
        ("qwen3-vl-8b", 8_767_123_696),
        ("llama-4-scout", 108_641_793_536),
        ("llama-4-maverick", 401_583_781_376),
        ("kimi-vl-a3b", 16_407_656_048),
    ],
)
def test_with_its_encoder_a_model_is_what_its_files_hold(name: str, total: int) -> None:
    spec = resolve(name)
    assert spec.parameters + numbers(spec.encoder) == total
    assert spec.encoder_bytes("bf16") == 2 * (total - spec.parameters)


def test_llava_is_clip_a_projector_and_vicuna() -> None:
    llama = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008,
        "vocab_size": 32_064, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    clip = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    spec = spec_from_config({"model_type": "llava", "text_config": llama, "vision_config": clip})
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert numbers(spec.encoder) == 303_507_456 + projector  # CLIP ViT-L/14 at 336
    assert spec.parameters + numbers(spec.encoder) == 7_063_427_072  # llava-1.5-7b


@pytest.mark.parametrize(
    ("name", "gib"),
    # "checkpoint size" of gpt-oss's model card; the others are the sums of their indexes
    [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8), ("qwen3-8b-awq", 5.68)],
)
def test_quantized_checkpoints_have_the_published_size(name: str, gib: float) -> None:
    assert resolve(name).weights_bytes("bf16") / GIB == pytest.approx(gib, abs=0.05)


SHARED_KV = CASES["gemma4-shared-kv"]


def by_layer(spec: ModelSpec, part: str) -> set[int]:
    return {layer for t in spec.tensors if part in t.name for layer in t.layers}


def test_layers_that_share_kv_have_neither_keys_nor_a_cache() -> None:
    spec = spec_from_config(SHARED_KV)
    assert [cache.width for cache in spec.caches] == [64, 128, 64, 128, 0, 0, 0]
    assert by_layer(spec, "k_proj") == by_layer(spec, "v_proj") == {0, 1, 2, 3}
    assert by_layer(spec, "q_proj") == set(range(7))
    wide = {t.layers: t.shape for t in spec.tensors if "up_proj" in t.name}
    assert wide == {(0, 1, 2, 3): (96, 64), (4, 5, 6): (192, 64)}  # twice as wide where shared


def test_values_that_are_keys_are_no_weights_but_are_kept() -> None:
    spec = spec_from_config(CASES["gemma4-experts"])
    assert by_layer(spec, "k_proj") - by_layer(spec, "v_proj") == {5, 6}  # those that see all
    assert spec.caches[5].width == spec.caches[6].width == 2 * 1 * 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers"),
        # the layers before it all slide: none to share with
        ({"num_kv_shared_layers": 6, "layer_types": ["sliding_attention"] * 6 + GEMMA4_TYPES[-1:]},
         "no earlier layer"),
        ({"layer_types": GEMMA4_TYPES[:-1]}, "6 layer_types for 7 layers"),
    ],
)  # fmt: skip
def test_shared_kv_that_cannot_be(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        spec_from_config({**SHARED_KV, **change})


@pytest.mark.parametrize(
    ("family", "change", "slides"),
    [
        ("gemma3_text", {"sliding_window_pattern": 3}, [0, 1, 3, 4, 6]),
        ("gemma3_text", {"sliding_window_pattern": 1}, []),
        ("gemma2", {}, [0, 2, 4, 6]),
        ("cohere2", {}, [0, 1, 2, 4, 5, 6]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 5}, [5, 6]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 99}, []),
        ("qwen2", {"max_window_layers": 0}, []),
        ("mistral", {"sliding_window": None}, []),
        ("starcoder2", {"sliding_window": 16}, list(range(7))),
        ("gpt_oss", {"num_local_experts": 6}, [0, 2, 4, 6]),
        ("llama4_text", {"num_local_experts": 6, "attention_chunk_size": 16}, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_which_layers_slide(family: str, change: dict[str, Any], slides: list[int]) -> None:
    spec = spec_from_config(case(family, num_key_value_heads=2, head_dim=16, **change))
    assert [layer for layer, window in enumerate(spec.windows) if window is not None] == slides
