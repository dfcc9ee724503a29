"""What `import ullage` promises: names that are there, and no heavy import."""

import subprocess
import sys

import ullage


def test_all_is_sorted_and_there() -> None:
    assert ullage.__all__ == sorted(ullage.__all__)
    assert all(hasattr(ullage, name) for name in ullage.__all__)


def test_every_public_name_says_what_it_is() -> None:
    undocumented = [name for name in ullage.__all__ if not getattr(ullage, name).__doc__]
    assert undocumented == []


def test_importing_brings_neither_torch_nor_transformers() -> None:
    script = "import sys, ullage; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
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
