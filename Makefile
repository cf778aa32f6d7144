# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv if needed.
# `make test-faults` runs the fault matrix in full and writes what it found to benchmarks/results/faults.json.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-faults lint types pytest clean

demo: .venv/installed
	$(BIN)/mmextract dump --layers all
	$(BIN)/mmextract probe

test: lint types pytest

test-faults: .venv/installed-test
	MMEXTRACT_FAULTS_JSON=benchmarks/results/faults.json $(BIN)/pytest -m faults tests/faults

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed-test
	$(BIN)/mypy

pytest: .venv/installed-test
	$(BIN)/pytest -n auto

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info activations.zarr probe
