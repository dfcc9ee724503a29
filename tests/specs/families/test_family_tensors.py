"""Every family against the model that transformers builds from the same config."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_cases import CASES, ELSEWHERE
from transformers import DynamicCache

from ullage.planner.engines import ENGINES
from ullage.planner.memory import kv_bytes_per_token
from ullage.specs.device import Device
from ullage.specs.families import FAMILIES, spec_from_config
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.workload import Engine, Execution, Workload

HfModel = Callable[[dict[str, Any]], Any]
HfShapes = Callable[[Any], dict[str, tuple[int, ...]]]


def checkpoint(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stored_shape for tensor in spec.tensors for name in tensor.names()}


def test_every_family_has_a_case() -> None:
    assert {case["model_type"] for case in CASES.values()} | ELSEWHERE == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_that_transformers_saves(
    case: str, hf_model: HfModel, hf_shapes: HfShapes
) -> None:
    spec, model = spec_from_config(CASES[case]), hf_model(CASES[case])
    theirs = hf_shapes(model)
    if spec.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    if case == "kimi_linear":  # it renames the plain MLPs too, which the published file does not
        theirs = {
            name.replace(".0.block_sparse_moe.", ".0.mlp."): shape for name, shape in theirs.items()
        }
    assert checkpoint(spec) == theirs
    in_buffers = sum(
        buffer.numel() for name, buffer in model.named_buffers() if name in model.state_dict()
    )
    assert spec.parameters == sum(w.numel() for w in model.parameters()) + in_buffers


@pytest.mark.parametrize("case", CASES)
def test_roles_are_the_modules_that_quantizers_convert(case: str, hf_model: HfModel) -> None:
    linear = Counter(
        tuple(module.weight.shape)
        for name, module in hf_model(CASES[case]).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and "router" not in name
    )
    ours: Counter[tuple[int, ...]] = Counter()
    for tensor in spec_from_config(CASES[case]).tensors:
        if tensor.role == "linear":
            ours[tensor.shape] += tensor.count
    assert ours == linear


# Whose window stands in `state_bytes`, beside entries that grow.
_COMPRESSED = {"deepseek_v4"}


@pytest.mark.parametrize("case", [case for case in CASES if case not in _COMPRESSED])
def test_caches_are_those_of_transformers(case: str, hf_model: HfModel) -> None:
    spec = spec_from_config(CASES[case])
    cache = DynamicCache(config=hf_model(CASES[case]).config)
    theirs = [
        layer.sliding_window if getattr(layer, "is_sliding", False) else None
        for layer in cache.layers
    ]
    shared = CASES[case].get("num_kv_shared_layers", 0)
    ours = list(spec.windows)[: len(theirs) - shared]
    assert ours == theirs[: len(theirs) - shared]
    assert len(spec.caches) == spec.num_layers
    for layer, kept in zip(cache.layers, spec.caches, strict=False):
        kind = type(layer).__name__
        assert (kept.width == 0) == (kind in ("LinearAttentionLayer", "DummyLayer"))
        assert (kept.state_bytes > 0) == kind.startswith("LinearAttention")


@pytest.mark.parametrize("case", CASES)
def test_geometry_is_that_of_transformers(case: str, hf_model: HfModel) -> None:
    spec, config = spec_from_config(CASES[case]), hf_model(CASES[case]).config
    assert spec.num_layers == config.num_hidden_layers
    assert spec.max_context_tokens == getattr(
        config, "max_position_embeddings", spec.max_context_tokens
    )
    assert spec.tie_embeddings is config.tie_word_embeddings
    assert spec.softcap == getattr(config, "attn_logit_softcapping", None)
    assert spec.dtype == "fp32"


# Keys whose defaults transformers keeps under another name, or sets in code.
_NOT_THEIRS = {
    "sliding_window_pattern", "rope_local_base_freq", "full_attention_interval",
    "partial_rotary_factor", "first_k_dense_replace", "global_head_dim",
    "max_position_embeddings", "sliding_window", "decoder_sparse_step", "n_shared_experts",
    "num_experts", "head_dim",
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"kimi_k2"}))
def test_defaults_are_those_of_the_config_class(family: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family)
    spelling = FAMILIES[family].spelling
    for key, value in FAMILIES[family].defaults.items():
        if key not in _NOT_THEIRS:
            found = getattr(theirs, spelling.get(key, key))
            assert found == value, key


@pytest.mark.parametrize(
    ("case", "held"),
    [
        ("qwen3_5", 6 * ((2 * 16 + 48) * 4 * 4 + 4 * 8 * 12 * 4)),
        ("nemotron_h", 2 * ((40 + 2 * 2 * 6) * 4 * 4 + 40 * 6 * 4)),
        ("kimi_linear", 5 * (90 * 4 * 4 + 3 * 10 * 10 * 4)),
        ("falcon_h1", 7 * ((40 + 2 * 2 * 6) * 4 * 4 + 40 * 6 * 4)),
    ],
)
def test_state_bytes(case: str, held: int) -> None:
    assert spec_from_config(CASES[case]).state_bytes == held


# AutoModel does not know Mistral 4, and transformers keeps new Falcons' keys for every query head.
_NOT_HELD = {"mistral4", "falcon-grouped", "falcon-one-norm", *_COMPRESSED}


@pytest.mark.parametrize("case", [case for case in CASES if case not in _NOT_HELD])
def test_a_real_cache_holds_what_is_planned(case: str) -> None:
    """Run a real tiny model and count what its cache holds after 40 tokens."""
    tokens, spec = 40, spec_from_config(CASES[case])
    planned = spec.state_bytes + 4 * sum(
        kept.width * (tokens if kept.window is None else min(tokens, kept.window - 1))
        for kept in spec.caches
    )
    assert held_bytes(CASES[case], tokens) == planned


@pytest.mark.parametrize("case", ["falcon-grouped", "falcon-one-norm", "falcon"])
@pytest.mark.parametrize("engine", ["ullage", "transformers"])
def test_new_falcons_are_planned_as_transformers_caches_them(case: str, engine: Engine) -> None:
    spec, cpu = spec_from_config(CASES[case]), Device("cpu", "cpu", 1 << 34)
    recipe = Recipe(spec, cpu, Workload(30, 10), Execution(engine, dtype="fp32", kv_dtype="fp32"))
    settled = ENGINES[engine].settle(recipe)
    assert 40 * kv_bytes_per_token(settled) == held_bytes(CASES[case], 40)
    assert ENGINES[engine].settle(settled) == settled


def held_bytes(config: dict[str, Any], tokens: int) -> int:
    """What the cache of a real model in fp32 holds after that many tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)  # threads cost more than these models do
    settings = {"pad_token_id": 0, **config}
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    with torch.no_grad():
        out = model(torch.ones((1, tokens), dtype=torch.long), use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    return sum(_bytes(layer) for layer in cache.layers)


@pytest.mark.parametrize("tokens", [255, 383])
def test_a_compressed_cache_holds_no_more_than_is_planned(tokens: int) -> None:
    config = {**CASES["deepseek_v4"], "max_position_embeddings": 512}
    spec = spec_from_config(config)
    held = held_bytes(config, tokens)
    planned = spec.state_bytes + 4 * sum(
        kept.width * (tokens if kept.window is None else min(tokens, kept.window - 1))
        for kept in spec.caches
    )
    assert held <= planned <= 1.05 * held


def _bytes(layer: Any) -> int:
    held: dict[int, int] = {}
    todo = list(vars(layer).values())
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            held[value.data_ptr()] = math.prod(value.shape) * value.element_size()
        elif isinstance(value, list | tuple):
            todo.extend(value)
        elif isinstance(value, dict):
            todo.extend(value.values())
    return sum(held.values())
