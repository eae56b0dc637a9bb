# Everything a person or CI does with this repository, as one word each: `make help`.
# Environments are made on first use and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers
BERGSON := .venv-bergson
BIN    := $(VENV)/bin

# One torch thread per process: the tests run side by side, and sums keep their order.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Options for every pytest run, e.g. make test PYTEST_ARGS="-x -k risk -n 0"
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
PYTEST      := $(ONE_THREAD) $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two installs into one environment at once would break it
.PHONY: help demo test test-slow doctest lint format types docs bench bench-quick clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- what there is to run -----------------------------------------------------------------------

demo: $(VENV)/.stamp-package  ## train a small network on wine with ten wrong labels, and find them
	$(BIN)/upweight demo wine

test: $(VENV)/.stamp-dev  ## the fast tests
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# pytest exits with 5 when it selected no test; having no slow test is not a failure.
test-slow: $(VENV)/.stamp-dev  ## the tests that take more than a few seconds each
	$(PYTEST) -m slow $(PYTEST_ARGS) || [ $$? -eq 5 ]

doctest: $(VENV)/.stamp-dev  ## the examples in docstrings, README.md and docs/*.md
	$(PYTEST) --doctest-modules --doctest-glob='*.md' src README.md docs

lint: $(VENV)/.stamp-dev  ## style, formatting, and the layering of the modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev  ## rewrite the files the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.stamp-dev  ## pyright, strict, on src
	$(BIN)/pyright

docs: $(VENV)/.stamp-docs  ## the documentation, its examples executed: docs/_build/html/index.html
	$(ONE_THREAD) MPLBACKEND=agg $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# A script that fails, for a bound or otherwise, does not keep the others from running.
bench: $(VENV)/.stamp-package $(PEERS)/.stamp-peers $(BERGSON)/.stamp-peers  ## upweight beside its peers, which get an environment of their own
	failed=; for script in wine digits wine_seeds wine_methods_seeds truth mislabel damping retraining audit scale values page; do \
	    $(ONE_THREAD) $(BIN)/python benchmarks/$$script.py || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

bench-quick: $(VENV)/.stamp-package  ## our side of the benchmarks alone, on small settings; nothing is written
	failed=; for script in wine digits wine_seeds wine_methods_seeds truth mislabel damping retraining audit scale values; do \
	    $(ONE_THREAD) $(BIN)/python benchmarks/$$script.py --quick || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean:  ## remove the environments and everything that was generated
	rm -rf $(VENV) $(PEERS) $(BERGSON) build dist docs/_build docs/api docs/gallery docs/sg_execution_times.rst
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# ---- environments -------------------------------------------------------------------------------

WANTED := pyproject.toml constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(PEERS)/bin/python:
	$(PYTHON) -m venv $(PEERS)

$(BERGSON)/bin/python:
	$(PYTHON) -m venv $(BERGSON)

# `|`: the interpreter must exist, but its date does not matter (it is a link to an older file).
$(VENV)/.stamp-package: $(WANTED) | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-package
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-package
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

$(PEERS)/.stamp-peers: constraints.txt benchmarks/peers/requirements.txt \
		benchmarks/peers/requirements-data.txt | $(PEERS)/bin/python
	$(PEERS)/bin/python -m pip install -c constraints.txt torch
	$(PEERS)/bin/python -m pip install -c constraints.txt -r benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --no-deps -r benchmarks/peers/requirements-data.txt
	@touch $@

$(BERGSON)/.stamp-peers: constraints.txt benchmarks/peers/requirements-bergson.txt \
		| $(BERGSON)/bin/python
	$(BERGSON)/bin/python -m pip install -c constraints.txt torch
	$(BERGSON)/bin/python -m pip install -c constraints.txt -r benchmarks/peers/requirements-bergson.txt
	@touch $@
