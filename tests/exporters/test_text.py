"""Whatever a model is called, a shell, YAML and Python read it as it was meant."""

import ast
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import InputError
from ullage.exporters.shared import text
from ullage.exporters.shared.options import Option
from ullage.exporters.shared.text import Noted

HOSTILE = [
    "a b", "it's", 'say "x"', "$(touch x)", "`touch x`", "a\nrm -rf /", "a\\", "\\\n", "a;b", "a&b",
    "#c", "!x", "*", "~", "-rf", "a: b", "{x}", "%TAG", "yes", "null", "1e3", "0x1F", "é", "🦙", "",
    "a # b", "- a", "a\tb", "|", ">-", "&a", "*a", "2001-01-01", "1_000", ".inf", "=", "<<",
]  # fmt: skip
names = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8"), max_size=30))


def written(name: str) -> bool:
    try:
        text.writable(name, "name")
    except InputError:
        return False
    return True


@pytest.mark.parametrize("name", HOSTILE)
def test_what_can_be_seen_is_written(name: str) -> None:
    assert text.writable(name, "name") == name


@pytest.mark.parametrize("name", ["a\0", "\x1b[31m", "a\r", "\x85", "\u2028", "\u202e", "\ud800"])
def test_what_cannot_be_seen_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="The name holds the character"):
        text.writable(name, "name")


@given(names.filter(written).filter(lambda name: " \\\n" not in name))
def test_shlex_reads_the_words_back(name: str) -> None:
    """Unlike bash, shlex knows no continued lines: they are joined for it first."""
    options = [Option("--model", name, name), Option("--flag", None, "why")]
    command = text.shell([name], [Option("A", "b:c", "why")], ["serve", name], options)
    joined = command.replace(" \\\n", " ")
    words = shlex.split(joined, comments=True)
    assert words == ["A=b:c", "serve", name, "--model", name, "--flag"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_reads_the_words_back() -> None:
    options = [Option(f"--o{n}", name, name) for n, name in enumerate(HOSTILE)]
    command = text.shell(HOSTILE, [Option("A", "b:c", "why")], ["serve"], options)
    script = 'serve() { printf "%s\\0" "$A" "$@"; }\n' + command
    done = subprocess.run(["bash"], input=script.encode(), capture_output=True, check=True)
    words = done.stdout.decode().split("\0")[:-1]
    assert done.stderr == b""
    expected = [word for n, name in enumerate(HOSTILE) for word in (f"--o{n}", name)]
    assert words == ["b:c", *expected]


@given(names.filter(written))
def test_yaml_reads_the_values_back(name: str) -> None:
    document: dict[str, Any] = {
        "a": Noted(name, name),
        "b": {"c": [{"d": name, "e": {}}, {"f": 1}], "g": True, "h": 0.25},
        "i": Noted([{"j": name}], f"{name}\n{name}"),
    }
    read = yaml.safe_load(text.yaml([name], document))
    assert read == {
        "a": name,
        "b": {"c": [{"d": name, "e": {}}, {"f": 1}], "g": True, "h": 0.25},
        "i": [{"j": name}],
    }


@given(names.filter(written))
def test_python_reads_the_string_back(name: str) -> None:
    assert ast.literal_eval(text.python(name)) == name
    assert ast.parse("\n".join(text.comments([name, name]))).body == []
