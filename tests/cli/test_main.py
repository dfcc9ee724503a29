"""Whatever a command raises becomes a line or two and an exit code."""

import errno
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ullage import cli
from ullage.errors import BudgetExceeded, InputError

ERRORS: dict[str, tuple[BaseException, int, str]] = {
    "input": (InputError("No such thing."), 2, "ullage: No such thing.\n"),
    "budget": (BudgetExceeded("Too much."), 1, "ullage: Too much.\n"),
    "extra": (
        ModuleNotFoundError("No module named 'gguf'", name="gguf"),
        2,
        "ullage: gguf is not installed: pip install 'ullage[run]'\n",
    ),
    "full disk": (
        OSError(errno.ENOSPC, "No space left on device"),
        2,
        "ullage: Cannot write the output: No space left on device.\n",
    ),
    "full disk of a file": (
        OSError(errno.ENOSPC, "No space left on device", "made.json"),
        2,
        "ullage: [Errno 28] No space left on device: 'made.json'\n",
    ),
    "bug": (
        ZeroDivisionError("by 0\nand more"),
        3,
        "ullage: ZeroDivisionError: by 0\nThis is a bug: ULLAGE_DEBUG=1 shows where; please "
        "report it.\n",
    ),
    "a module of no extra": (ModuleNotFoundError("No module named 'x'", name="x"), 3, ""),
    "interrupt": (KeyboardInterrupt(), 130, ""),
}


@pytest.fixture(autouse=True)
def own_interrupts() -> Iterator[None]:
    """pytest's own answer to an interrupt comes back after each test."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """`raises(error)`: what the command line will raise."""

    def prepare(error: BaseException) -> None:
        def app() -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)

    return prepare


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_a_line_or_two_and_a_code(
    raises: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    error, code, says = ERRORS[name]
    raises(error)
    monkeypatch.delenv("ULLAGE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize("name", ["full disk", "bug", "extra"])
def test_debugging_shows_the_traceback(
    raises: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    error, _, _ = ERRORS[name]
    raises(error)
    monkeypatch.setenv("ULLAGE_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main()


def test_an_interrupt_that_an_import_swallows_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")

    monkeypatch.setattr(cli, "app", app)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_the_modules_of_the_extra_are_those_of_the_project_file() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = {need.partition(">")[0] for need in project["optional-dependencies"]["run"]}
    assert named == cli._OF_RUN


PLAN = [sys.executable, "-m", "ullage", "plan", "smollm2-135m", "--device", "24GiB"]


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(words: list[str]) -> None:
    plan = subprocess.Popen([*PLAN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert plan.stdout is not None
    plan.stdout.close()
    assert plan.communicate()[1] == b""
    assert plan.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_output_to_a_full_disk_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PLAN, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "ullage: Cannot write the output: No space left on device.\n"


def test_a_terminal_without_the_signs_still_gets_the_table(
    ullage: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = ullage(*PLAN[3:], PYTHONIOENCODING="ascii", COLUMNS="120")
    assert done.returncode == 0
    assert "???" in done.stdout


def test_a_choice_that_is_none_is_refused_in_our_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ullage", "plan", "smollm2-135m", "--engine", "ollama"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "'--engine': 'ollama' is not one of 'ullage'," in capsys.readouterr().err
