"""Names of modules, as quantization configs write them."""

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import ModelError
from ullage.specs.patterns import Patterns

UP = "model.layers.1.mlp.up_proj"
parts = st.sampled_from(["model", "layers", "0", "1", "11", "mlp", "up_proj", "up", "self_attn"])
modules = st.lists(parts, min_size=1, max_size=6).map(".".join)


@pytest.mark.parametrize(
    ("written", "module", "stands"),
    [
        (UP, UP, True),
        ("model.layers.1", UP, True),  # what is inside it
        ("up_proj", UP, True),  # its last parts
        ("mlp.up_proj", UP, True),
        ("mlp", UP, False),  # neither the first parts nor the last
        ("model.layers.1.mlp.up", UP, False),  # part of a part
        ("proj", UP, False),
        ("model.layers.11", UP, False),
        ("", UP, False),
        ("model.layers.*", UP, True),
        ("*.up_proj", UP, True),
        ("*up_proj", UP, True),
        ("layers.*", UP, False),  # from the name's start
        ("*.up", UP, False),  # to its end
        ("model.layers.1.*", "model_layers_1.x", False),  # a dot is a dot
        ("*[1]*", UP, False),  # a bracket is a bracket
        (r"re:.*\.1\..*", UP, True),
        ("re:model", UP, True),  # compressed-tensors matches from the start, not to the end
        ("re:up_proj", UP, False),
        ("re:.*up_proj$", UP, True),
        ("re:.*up_proj$", UP + "_scale", False),
        ("re:", UP, True),  # an empty expression stands for everything
        # with what a wrapper puts before it
        ("language_model.model.layers.1.mlp.up_proj", UP, True),
        ("model.language_model.layers.1", UP, True),
        ("re:^language_model.model.layers", UP, True),
        ("re:^model.language_model.layers", UP, True),
        ("language_model.lm_head", "lm_head", True),
        ("re:vision_tower.*", UP, False),
    ],
)
def test_what_a_pattern_stands_for(written: str, module: str, stands: bool) -> None:
    assert Patterns([written]).matches(module) is stands


@given(modules)
def test_a_module_stands_for_itself_and_what_is_inside(module: str) -> None:
    patterns = Patterns([module])
    assert patterns.matches(module)
    assert patterns.matches(f"{module}.weight_scale")
    assert patterns.matches(f"outer.{module}")
    assert not Patterns([]).matches(module)


@given(st.lists(modules, max_size=4), modules)
def test_one_of_several_is_enough_in_any_order(written: list[str], module: str) -> None:
    each = [Patterns([pattern]).matches(module) for pattern in written]
    assert Patterns(written).matches(module) is any(each)
    assert Patterns(reversed(written)).matches(module) is any(each)


@given(modules, modules)
def test_an_escaped_expression_is_the_name(name: str, module: str) -> None:
    stands = Patterns([f"re:^{re.escape(name)}$"]).matches(module)
    assert not stands or module in (name, name.removeprefix("language_model."))
    assert Patterns([f"re:^{re.escape(name)}$"]).matches(name)


@given(st.text(max_size=30).map(lambda text: f"re:{text}"))
def test_an_expression_is_compiled_or_refused(pattern: str) -> None:
    with suppress(ModelError):
        assert Patterns([pattern, "lm_head"]).matches("lm_head")


def test_two_expressions_do_not_run_into_each_other() -> None:
    patterns = Patterns(["re:a|b", "re:c$"])
    assert [patterns.matches(name) for name in ("a", "bx", "c", "cx")] == [True, True, True, False]
