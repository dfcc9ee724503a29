"""What can be changed, and what it is said to cost where it is offered."""

from dataclasses import replace
from typing import Any

import pytest

from ullage import Recipe, TechniqueChoice, Workload, default_execution, find_device, resolve
from ullage.planner.costs import FREE, Cost
from ullage.planner.engines import ENGINES
from ullage.planner.levers import CHUNKS, levers_of
from ullage.planner.search import Freedom
from ullage.specs.device import Device
from ullage.specs.quality import Quality
from ullage.specs.workload import Engine

CARD = find_device("rtx-4090")
ALL_FREE = Freedom()


def recipe(engine: Engine = "ullage", model: str = "llama-3.1-8b", **told: Any) -> Recipe:
    execution = replace(default_execution(CARD, engine), **told)
    return Recipe(resolve(model), CARD, Workload(9000, 96, 20), execution)


def typed(asked: Recipe, name: str, freedom: Freedom = ALL_FREE, *others: Device) -> list[str]:
    (lever,) = [lever for lever in levers_of(asked, freedom, others) if lever.name == name]
    return [setting.typed for setting in lever.settings]


@pytest.mark.parametrize(
    ("engine", "formats"),
    [
        ("ullage", ["int8"]),
        ("vllm", ["fp8"]),  # int8 is as wide
        ("sglang", ["fp8"]),
        ("llama.cpp", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),  # iq4_nl is as wide as q4_0
    ],
)
def test_kv_entries_get_narrower_one_format_a_width(engine: Engine, formats: list[str]) -> None:
    assert typed(recipe(engine), "KV entries") == ["", *(f"--kv-cache-dtype {n}" for n in formats)]


def test_int8_entries_of_ours_are_offered_where_their_cost_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = Quality("kv", "int8", "m", 10, "perplexity %", 0.2, 8, "measured", "a run of ours")
    monkeypatch.setattr(
        "ullage.planner.costs.find", lambda _, *of: known if of == ("kv", "int8") else None
    )
    assert typed(recipe(), "KV entries") == ["", "--kv-cache-dtype int8"]
    assert typed(recipe("transformers"), "KV entries") == [""]
    assert typed(recipe(kv_dtype="int8"), "KV entries") == [""]


def test_fp8_entries_of_ours_are_never_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in int8's place either, where its cost is not known and fp8's is."""
    known = Quality("kv", "fp8", "m", 10, "perplexity %", 0.2, 8, "measured", "a run of ours")
    monkeypatch.setattr(
        "ullage.planner.costs.find", lambda _, *of: known if of == ("kv", "fp8") else None
    )
    assert typed(recipe(), "KV entries") == [""]
    assert typed(recipe(kv_dtype="fp8"), "KV entries") == [""]


@pytest.mark.parametrize(
    ("chunk", "smaller"),
    [(512, [256, 128, 64, 32]), (128, [64, 32]), (32, []), (0, list(CHUNKS))],
)
def test_chunks_get_smaller(chunk: int, smaller: list[int]) -> None:
    expected = ["", *(f"--prefill-chunk {tokens}" for tokens in smaller)]
    assert typed(recipe(prefill_chunk=chunk), "chunk") == expected


@pytest.mark.parametrize(
    ("limit", "settings"),
    # 20 sequences are asked for, so that 16 is too few; the default is 256 on a card of 24 GiB
    [(None, ["", "--max-num-seqs 64"]), (64, [""]), (300, ["", "--max-num-seqs 256",
                                                         "--max-num-seqs 64"])],
)  # fmt: skip
def test_a_servers_limit_gets_lower_but_not_below_what_is_asked(
    limit: int | None, settings: list[str]
) -> None:
    assert typed(recipe("vllm", max_num_seqs=limit), "sequences") == settings


@pytest.mark.parametrize(
    ("model", "ways"),
    [("llama-3.1-8b", [2, 4, 8]), ("smollm2-135m", []), ("qwen3-30b-a3b", [2, 4, 8])],
)
def test_devices_are_those_that_the_heads_divide_among(model: str, ways: list[int]) -> None:
    """SmolLM2-135M has nine heads."""
    asked = recipe("vllm", model)
    assert typed(asked, "tensor parallel") == ["", *(f"--tp {devices}" for devices in ways)]


def test_formats_for_models_trained_so_are_no_choice() -> None:
    formats = typed(recipe("llama.cpp"), "weights")
    assert "--weights iq1_s" in formats
    assert "--weights tq1_0" not in formats
    assert "tq1_0" in ENGINES["llama.cpp"].weights


def test_what_is_fixed_has_one_setting() -> None:
    fixed = Freedom(False, False, False, False, False, False)
    for engine in ("ullage", "vllm", "llama.cpp"):
        for lever in levers_of(recipe(engine), fixed):  # type: ignore[arg-type]
            assert [setting.typed for setting in lever.settings] == [""]


def test_the_asked_device_is_no_other() -> None:
    h100 = find_device("h100")
    assert typed(recipe(), "device", Freedom(), CARD, h100) == ["", "--device h100-80gb"]


def test_a_model_that_only_slides_has_nothing_to_drop() -> None:
    assert typed(recipe(model="mistral-7b-v0.1"), "sparsity") == [""]
    assert len(typed(recipe(), "sparsity")) == 7


def test_a_technique_that_was_asked_for_costs_what_it_costs() -> None:
    asked = replace(recipe(), techniques=(TechniqueChoice("dms", {"kept": 0.125}),))
    (sparsity,) = [x for x in levers_of(asked, Freedom(sparsity=False)) if x.name == "sparsity"]
    assert sparsity.settings[0].runs
    assert sparsity.settings[0].cost.figure is not None
    assert sparsity.settings[0].cost.figure.technique == "dms"


@pytest.mark.parametrize(
    ("settings", "known"),
    [({"kept": 0.5}, True), ({"kept": 0.5, "predictor": "window"}, False),
     ({"kept": 0.5, "window": 8}, False), ({"kept": 0.5, "window": 512}, True)],
)  # fmt: skip
def test_a_figure_counts_for_the_settings_that_it_was_taken_with(
    settings: dict[str, Any], known: bool
) -> None:
    asked = replace(recipe(), techniques=(TechniqueChoice("dms", settings),))
    (sparsity,) = [x for x in levers_of(asked, Freedom(sparsity=False)) if x.name == "sparsity"]
    assert (sparsity.settings[0].cost.figure is not None) is known


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_plain_format_as_wide_as_the_checkpoints_is_free(dtype: str) -> None:
    (weights,) = [x for x in levers_of(recipe(dtype=dtype), ALL_FREE) if x.name == "weights"]
    assert weights.settings[0].cost == FREE


def test_servers_figures_are_kept_under_the_names_of_their_formats() -> None:
    """int8 is w8a8 there, and torchao's in ullage: not the same loss."""

    def cost(engine: Engine, setting: str) -> Cost:
        asked = ENGINES[engine].with_weights(recipe(engine), setting)
        (weights,) = [x for x in levers_of(asked, Freedom()) if x.name == "weights"]
        return weights.settings[0].cost

    served, own = cost("vllm", "int8").figure, cost("ullage", "int8").figure
    assert served is not None
    assert own is not None
    assert (served.setting, own.setting) == ("w8a8", "int8")
