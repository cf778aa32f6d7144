# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv if needed.
# `make test-faults` runs the fault matrix in full and writes what it found to benchmarks/results/faults.json;
# `make test-faults RESUME=1` leaves out the rows that are recorded there as passed by the same sources.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types pytest test-faults test-kernels clean

demo: .venv/installed
	$(BIN)/mmextract dump --layers all
	$(BIN)/mmextract probe
	$(BIN)/mmextract experiment --preset demo -o run

test: lint types pytest

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed-test
	$(BIN)/mypy

pytest: .venv/installed-test
	$(BIN)/pytest -n auto

# Row L lies in one file, whose tests one process must run to count them.
test-faults: export MMEXTRACT_FAULTS_JSON = benchmarks/results/faults.json
test-faults: export MMEXTRACT_FAULTS_RESUME = $(RESUME)
test-faults: .venv/installed-test
	$(if $(RESUME),,rm -f $(MMEXTRACT_FAULTS_JSON))
	$(BIN)/pytest tests/engine/test_interoperability.py; interoperable=$$?; \
	$(BIN)/pytest -n auto --dist worksteal -m faults -rs && exit $$interoperable

# Every filter, mode and shape of the kernels against Pillow and torchvision, in Triton's interpreter.
test-kernels: .venv/installed-test
	$(BIN)/pytest -n auto -m kernels tests/kernels

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info activations.zarr probe run
