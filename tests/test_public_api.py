"""What `import ullage` promises: names that are there, no heavy import, and an answer at once."""

import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

import ullage
from ullage import techniques

PLANNING_ROOMS = ("errors", "units", "specs", "planner", "exporters", "doctor")


def test_all_is_sorted_and_there() -> None:
    assert ullage.__all__ == sorted(ullage.__all__)
    assert all(hasattr(ullage, name) for name in ullage.__all__)


def test_every_public_name_says_what_it_is() -> None:
    undocumented = [name for name in ullage.__all__ if not getattr(ullage, name).__doc__]
    assert undocumented == []


def planning_modules() -> list[str]:
    """All that `ullage plan` may import: the rooms whole, and of each technique its settings."""
    rooms = [find_spec(f"ullage.{room}") for room in PLANNING_ROOMS]
    found = [f"ullage.techniques.{name}.settings" for name in techniques.names()]
    for room in filter(None, rooms):
        places = room.submodule_search_locations or ()
        found += [room.name]
        found += [module.name for module in pkgutil.walk_packages(places, f"{room.name}.")]
    return found


@pytest.mark.parametrize("modules", [["ullage"], planning_modules()], ids=["ullage", "planning"])
def test_importing_brings_neither_torch_nor_transformers(modules: list[str]) -> None:
    script = f"import sys, {', '.join(modules)}; "
    script += "print(sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="counts a child's processor time")
@pytest.mark.parametrize(
    "words",
    [
        ["-m", "ullage", "plan", "smollm2-135m", "--device", "24GiB", "--json"],
        ["-c", "import ullage"],
    ],
    ids=["plan", "import"],
)
def test_the_answer_takes_less_than_half_a_second(words: list[str]) -> None:
    assert min(processor_s(words) for _ in range(5)) < 0.5


def processor_s(words: list[str]) -> float:
    """What a fresh interpreter takes of a processor: a busy machine does not add to it, as it does
    to the time on the wall."""
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return used.ru_utime + used.ru_stime


def test_readmes_python_plans_a_model() -> None:
    recipe = ullage.Recipe(
        ullage.resolve("llama-3.1-8b"),
        ullage.find_device("rtx-4090"),
        ullage.Workload(prompt_tokens=8000, output_tokens=192),
        ullage.Execution(),
    )
    plan = ullage.build_plan(recipe)
    assert plan.fits
    assert plan.cliff.max_model_len is not None
    assert plan.cliff.max_model_len > 8192
    assert ullage.Plan.from_json(plan.to_json()) == plan
