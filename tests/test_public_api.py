"""What `import ullage` promises: names that are there, no heavy import, and an answer at once."""

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
