"""Every option that an exporter can write is one that its engine's own parser knows."""

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ullage import exporters
from ullage.errors import InputError
from ullage.exporters.shared.options import known
from ullage.planner.constants import newest_version

ROOM = Path(exporters.__file__).parent
ENGINES = {
    "vllm": "vllm.py",
    "sglang": "sglang.py",
    "llama.cpp": "llama_cpp.py",
    "transformers": "transformers.py",
}
# The program's own words, which are no options.
NOT_OPTIONS = {"**inputs"}


def calls(engine: str, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse((ROOM / ENGINES[engine]).read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if function in (name, node.func.id if isinstance(node.func, ast.Name) else ""):
                yield node


def written(engine: str) -> set[str]:
    """The names of all options in an exporter's code, but for environment variables."""
    names = {
        call.args[0].value
        for call in calls(engine, "Option")
        if isinstance(call.args[0], ast.Constant)
    }
    return {name for name in names if not name.isupper()} - NOT_OPTIONS


@pytest.mark.parametrize("engine", ENGINES)
def test_every_option_is_known(engine: str) -> None:
    names = written(engine)
    assert len(names) > 5
    assert names <= known(engine).names


@pytest.mark.parametrize("engine", ENGINES)
def test_every_choice_that_is_asked_for_is_listed(engine: str) -> None:
    asked = {call.args[0].value for call in calls(engine, "choice")}  # type: ignore[attr-defined]
    assert asked
    assert asked <= set(known(engine).choices)


def test_a_value_that_the_engine_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match=r"vllm .* has no --kv-cache-dtype 'q8_0'. It has auto"):
        known("vllm").choice("--kv-cache-dtype", "q8_0")


def test_every_target_has_a_version() -> None:
    assert all(known(name).version for name in exporters.names())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_planner_and_the_exporter_know_the_same_newest_version(engine: str) -> None:
    assert known(engine).version == newest_version(engine)


# What follows reads the engines themselves, where they are installed.


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(found.origin).parent


def test_vllm_itself_knows_them() -> None:
    source = (package("vllm") / "engine" / "arg_utils.py").read_text("utf-8")
    strings = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert written("vllm") <= strings
    fields = {
        node.target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {name[2:].replace("-", "_") for name in written("vllm")} <= fields  # Ray's spelling


def test_sglang_itself_knows_them() -> None:
    folder = package("sglang") / "srt" / "arg_groups" / "fields"
    fields = {
        f"--{node.target.id}".replace("_", "-")
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if "no_cli=True" not in ast.unparse(node.annotation)
    }
    assert written("sglang") <= fields


def test_llama_server_itself_knows_them() -> None:
    program = shutil.which("llama-server")
    if program is None:
        pytest.skip("llama-server is not installed")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert written("llama.cpp") <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_transformers_itself_knows_them() -> None:
    package("transformers")
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        GenerationConfig,
        PreTrainedModel,
        TorchAoConfig,
    )

    functions = (PreTrainedModel.from_pretrained, AutoModelForCausalLM.from_pretrained)
    names = set(vars(GenerationConfig()))
    names |= set(inspect.signature(BitsAndBytesConfig).parameters)
    names |= set(inspect.signature(TorchAoConfig).parameters)
    bodies = " ".join(inspect.getsource(function) for function in functions)
    missing = {
        name
        for name in known("transformers").names - names
        if not re.search(rf"\b{name}\b", bodies)
    }
    assert missing == set()


def test_ray_itself_knows_them() -> None:
    folder = package("ray") / "llm" / "_internal" / "serve" / "core" / "configs"
    source = (folder / "llm_config.py").read_text("utf-8")
    fields = {name.rpartition(".")[2] for name in known("ray").names}
    assert all(re.search(rf"^    {name}:", source, re.MULTILINE) for name in fields)
