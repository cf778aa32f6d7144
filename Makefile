# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv if needed.
# `make test-faults` runs the fault matrix in full and writes what it found to benchmarks/results/faults.json.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types pytest test-faults clean

demo: .venv/installed
	$(BIN)/mmextract dump --layers all
	$(BIN)/mmextract probe

test: lint types pytest

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed-test
	$(BIN)/mypy

pytest: .venv/installed-test
	$(BIN)/pytest -n auto

test-faults: .venv/installed-test
	MMEXTRACT_FAULTS_JSON=benchmarks/results/faults.json $(BIN)/pytest -n auto -m faults
	MMEXTRACT_FAULTS_JSON=benchmarks/results/faults.json $(BIN)/pytest tests/engine/test_interoperability.py

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info activations.zarr probe
