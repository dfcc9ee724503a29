"""No config, however it lies, ends in anything but a spec or an error of ours."""

import copy
import json
from contextlib import suppress
from typing import Any

import pytest
from family_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.errors import UllageError
from ullage.specs import sources
from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec

CONFIGS = [sources._entry_config(entry) for entry in sources.catalog().values()]
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**30, 2**31, 1.5, float("nan"), float("inf"), "", "x",
    "full_attention", [], [0], [1, 2, 3], ["full_attention"], [None], [[]], {}, {"a": 1},
    {"rope_type": "yarn", "factor": 1e30}, "re:(a+)+$",
]  # fmt: skip


def paths(config: Any, depth: int = 3) -> list[tuple[Any, ...]]:
    """Places in a config, down to `depth`."""
    if depth == 0 or not isinstance(config, dict):
        return []
    below = [(key, *rest) for key, value in config.items() for rest in paths(value, depth - 1)]
    return [(key,) for key in config] + below


def changed(config: dict[str, Any], path: tuple[Any, ...], value: Any, remove: bool) -> Any:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return config


def is_sane(spec: ModelSpec) -> None:
    """A spec that came out can be counted, and survives JSON."""
    assert spec.parameters > 0
    assert 0 < spec.active_parameters <= spec.parameters
    assert spec.weights_bytes("bf16") > 0
    assert len(spec.caches) == spec.num_layers
    assert all(cache.width >= 0 and cache.state_bytes >= 0 for cache in spec.caches)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@settings(max_examples=600)
@given(st.data())
def test_a_changed_config_of_the_catalog(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(CONFIGS))
    path = data.draw(st.sampled_from(paths(config)))
    value = data.draw(st.sampled_from(JUNK))
    with suppress(UllageError):
        is_sane(spec_from_config(changed(config, path, value, data.draw(st.booleans()))))


@pytest.mark.parametrize("case", CASES)
def test_every_key_of_every_family(case: str) -> None:
    config = CASES[case]
    for path in paths(config):
        for value in JUNK:
            with suppress(UllageError):
                is_sane(spec_from_config(changed(config, path, value, False)))
        with suppress(UllageError):
            is_sane(spec_from_config(changed(config, path, None, True)))


LAYERED = [
    name
    for name, config in CASES.items()
    if "num_hidden_layers" in config
    and not {"layer_types", "indexer_types", "linear_attn_config", "layers_block_type"}
    & set(config)
    and "hybrid_override_pattern" not in config
]


@settings(max_examples=60)
@given(st.sampled_from(LAYERED), st.integers(1, 30), st.integers(0, 500), st.integers(0, 500))
def test_bytes_never_fall(case: str, layers: int, tokens: int, more: int) -> None:
    """With layers and with tokens."""
    config = CASES[case]
    with suppress(UllageError):
        small = spec_from_config({**config, "num_hidden_layers": layers})
        large = spec_from_config({**config, "num_hidden_layers": layers + 1})
        assert small.weights_bytes("bf16") < large.weights_bytes("bf16")
        assert small.state_bytes <= large.state_bytes
        assert kept(small, tokens) <= kept(large, tokens)
        assert kept(small, tokens) <= kept(small, tokens + more)


def kept(spec: ModelSpec, tokens: int) -> int:
    return sum(cache.width * cache.kept_tokens(tokens) for cache in spec.caches)
