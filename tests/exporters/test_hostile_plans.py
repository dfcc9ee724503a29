"""Plans whose names are attacks: what is exported is one command, one document or one program that
does what was planned, or our error."""

import ast
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import dropwhile
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ullage import exporters
from ullage.errors import InputError
from ullage.exporters import kserve
from ullage.exporters.shared import plans
from ullage.exporters.shared.options import known
from ullage.specs.device import Device
from ullage.specs.model import Storage
from ullage.specs.plan import Plan
from ullage.units import GIB

MakePlan = Callable[..., Plan]
SHELLS = ("vllm", "sglang", "llama.cpp")
TARGETS = exporters.names()
HOSTILE = [
    "x; touch y", "x && touch y", "$(touch y)", "`touch y`", "x\ntouch y", "x\n# y\ntouch y",
    "x' ; touch y '", 'x" ; touch y "', "x \\", "x\\\n", "-rf", "--trust-remote-code",
    "--help --x", "x: {y: z}", "x # y", "- x", "&a *a", "!!python/object/apply:os.system [x]",
    "{{ x }}", "%s %(x)s {0}", '"""\nimport os\n"""', "x')\nimport os\n('", "\\N{BULLET} \\x41",
    "é", "🦙/🦙", "../../etc/passwd", "~/x", "x/y@z/w", "https://x.y/z", "a" * 4000, "null", "1e3",
]  # fmt: skip


@pytest.fixture(scope="module")
def plan(make_plan: MakePlan) -> Plan:
    return make_plan()


def renamed(plan: Plan, name: str, field: str) -> Plan:
    """`plan` with a name in one of the places that an exporter reads."""
    recipe = plan.recipe
    if field == "device":
        return replace(plan, recipe=replace(recipe, device=replace(recipe.device, name=name)))
    changes = {"name": {"name": name, "source": ""}, "both": {"name": name, "source": name}}
    found = changes.get(field, {field: name})
    return replace(plan, recipe=replace(recipe, model=replace(recipe.model, **found)))


def names_in(target: str, text: str) -> set[str]:
    """Every string that an engine will be given."""
    if target in SHELLS:
        return set(shlex.split(text.replace(" \\\n", " "), comments=True))
    if target == "transformers":
        nodes = ast.walk(ast.parse(text))
        return {node.value for node in nodes if isinstance(node, ast.Constant)}
    return set(strings(yaml.safe_load(text)))


def strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in strings(value)]
    return [str(node)]


def code(target: str, text: str) -> str:
    """What is exported without its values: the same whatever things are called."""
    if target == "transformers":
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        return ast.dump(tree)
    if target in SHELLS:
        words = shlex.split(text.replace(" \\\n", " "), comments=True)
        return " ".join(word for word in words if word in known(target).names)
    return str(shape(yaml.safe_load(text)))


def shape(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: shape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [shape(value) for value in node]
    return type(node).__name__


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("field", ["source", "name", "both", "device"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_changes_values_and_nothing_else(
    plan: Plan, name: str, field: str, target: str
) -> None:
    try:
        text = exporters.export(renamed(plan, name, field), target)
    except InputError:
        assert target == "kserve"  # which no hub id of this kind can reach
        return
    plain = renamed(plan, "org/tiny" if field != "device" else "some", field)
    usual = exporters.export(plain, target)
    if target in SHELLS:
        revision = "--revision" in text.split()
        assert code(target, text).replace("--revision ", "", revision) == code(target, usual)
    elif "@" not in name:
        assert code(target, text) == code(target, usual)
    if field in ("source", "both") and "@" not in name and target in ("vllm", "sglang"):
        assert {name, f"./{name}"} & names_in(target, text)


@pytest.mark.parametrize("target", SHELLS)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_ends_a_comment_or_leaves_its_quotes(plan: Plan, name: str, target: str) -> None:
    for field in ("name", "both", "device"):
        lines = exporters.export(renamed(plan, name, field), target).splitlines()
        command = "\n".join(dropwhile(lambda line: line.startswith("# "), lines))
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
        assert "#" not in bare
        assert "touch y" not in bare
        assert bare.count("\n") == bare.count(" \\\n")  # one command


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(name=st.text(max_size=40), target=st.sampled_from(TARGETS),
       field=st.sampled_from(["source", "name", "device"]))  # fmt: skip
def test_any_name_is_written_or_refused(plan: Plan, name: str, target: str, field: str) -> None:
    try:
        text = exporters.export(renamed(plan, name, field), target)
    except InputError as refusal:
        text = str(refusal)
        assert len(text.splitlines()) == 1
        return
    text.encode("utf-8")
    assert "\0" not in text
    assert "\x1b" not in text
    names_in(target, text)


@given(st.text(max_size=80) | st.from_regex(r"[0-9a-z.-]{0,80}", fullmatch=True))
@example("7" * 60)  # a digit is no first letter
@example("a" * 52 + ".b")
@example("")
def test_an_objects_name_is_one_that_kubernetes_takes(name: str) -> None:
    found = kserve._object_name(name)
    assert re.fullmatch(r"[a-z](?:[a-z0-9-]*[a-z0-9])?", found)
    assert len(found) <= kserve._LONGEST_NAME


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/m", plans.Weights("org/m")),
        ("org/m@v1", plans.Weights("org/m", "v1")),
        ("org/m@refs/pr/7", plans.Weights("org/m", "refs/pr/7")),
        ("org/m@", plans.Weights("org/m@")),
        ("@v1", plans.Weights("@v1")),
        ("a/b/c@v1", plans.Weights("a/b/c@v1")),  # a folder may be called so
        ("/m/x.GGUF", plans.Weights("/m/x.GGUF", gguf=True)),
        ("-x.gguf", plans.Weights("./-x.gguf", gguf=True)),
        ("-/m@v1", plans.Weights("./-/m", "v1")),
        ("", plans.Weights("tiny-llama", unknown=True)),
        ("package:a/b.gguf", plans.Weights("tiny-llama", unknown=True)),
    ],
)
def test_where_weights_are(plan: Plan, source: str, expected: plans.Weights) -> None:
    assert plans.weights_of(replace(plan.recipe.model, source=source)) == expected


def test_formats_stand_in_the_order_of_their_numbers(plan: Plan) -> None:
    model = plan.recipe.model
    kinds = {"linear": Storage("FP8", 8), "embedding": Storage("q4_k", 4.5)}
    tensors = tuple(replace(t, storage=kinds.get(t.role)) for t in model.tensors)
    stored = replace(model, tensors=tensors)
    assert stored.stored_formats == ("fp8", "q4_k")
    assert not plans.gguf_types(stored)  # fp8 is none of GGUF's
    assert plans.gguf_types(model)
    assert model.stored_formats == ()


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_a_share_takes_no_byte_more(
    plan: Plan, memory_bytes: int, budget_bytes: int, nbytes: int
) -> None:
    recipe = replace(plan.recipe, device=Device("d", "cuda", memory_bytes))
    plan = replace(plan, recipe=recipe, budget_bytes=budget_bytes)
    share = plans.fraction_of(plan, nbytes)
    assert (share is None) is (budget_bytes >= memory_bytes)
    if share is None or nbytes > memory_bytes:
        return
    steps = round(share * plans.FRACTION_STEPS)
    assert 1 <= steps <= plans.FRACTION_STEPS
    assert steps == 1 or steps * memory_bytes // plans.FRACTION_STEPS <= nbytes
    assert (steps + 2) * memory_bytes > nbytes * plans.FRACTION_STEPS  # nor much less


def test_what_a_reader_is_told(make_plan: MakePlan) -> None:
    plan = make_plan(budget_bytes=60 * GIB, engine="vllm", engine_version="0.19.0")
    first, second, third = plans.notes_of(plan, known("vllm"))
    assert first == "tiny-llama on h100-80gb: 4 x (3,840 prompt + 256 output tokens)."
    assert second.startswith("Planned for vllm 0.19.0: peak ")
    assert "of 60.00 GiB a device." in second
    assert third.startswith("WARNING: 4,096 tokens are beyond")
