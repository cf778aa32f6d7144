# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv if needed.
# `make test-faults` runs the fault matrix in full and writes what it found to benchmarks/results/faults.json;
# `make test-faults RESUME=1` leaves out the rows that are recorded there as passed by the same sources.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types pytest test-faults test-kernels test-kernels-oldest clean

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

# The kernels' tests with torch 2.11 and Triton 3.6, the oldest that they are held to, in an environment of their own.
test-kernels-oldest: .venv-oldest/installed
	.venv-oldest/bin/pytest -n auto tests/kernels

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

# What is in constraints-oldest.txt takes the place of the same packages in constraints.txt.
.venv-oldest/installed: pyproject.toml constraints.txt constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed -n 's/^\([A-Za-z0-9_-]*\)==.*/^\1==/p' constraints-oldest.txt \
	  | grep -v -f - constraints.txt | cat - constraints-oldest.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet -c .venv-oldest/constraints.txt -e ".[triton,s3]" \
	  pytest pytest-timeout pytest-xdist scikit-image
	touch $@

clean:
	rm -rf .venv .venv-oldest build *.egg-info activations.zarr probe run
