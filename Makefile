# The few verbs of this repository. Everything goes into a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)

.PHONY: help install demo paper-mini test test-all lint format bench bench-compare clean
help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make the virtual environment and build the native module

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "influence-fast needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install  ## the main job on the built-in world: under 5 minutes on two cores; see demo-run/report.html
	$(BIN)/influence-fast demo --output demo-run

paper-mini: install  ## the paper's experiment over five worlds, under 40 minutes on two cores; see docs/paper-mini.md
	$(BIN)/python -m benches.paper_mini --output runs/paper-mini

test: lint  ## lint, types and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-all: install  ## as test, with the settings and moments that it samples: twice as long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" --numprocesses auto --maxprocesses 8 --dist worksteal

lint: install  ## ruff (format and lint) and mypy
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/mypy kernels tests/typing/user_code.py

format: install  ## rewrite the sources in the house's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: install  ## the benchmark suites and their plots, on the CPU: under 15 minutes on two quiet cores
	$(BIN)/python -m pytest benches/suites -p no:xdist -p no:cacheprovider --timeout=1200 \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name --results benches/results/suites-cpu.json
	$(BIN)/python -m benches.roofline --output benches/results/roofline-cpu.json
	$(BIN)/python -m benches.suites.plots

bench-compare: install  ## every suite, this tree against another commit: make bench-compare BASE=main
	$(BIN)/python -m benches.compare_refs $(BASE)

clean:  ## remove what was built (not the virtual environment)
	rm -rf build demo-run demo-run-world .pytest_cache .mypy_cache .ruff_cache
