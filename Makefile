# make run and make test set everything up by themselves; make help lists the rest.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTHON313 ?= $(shell for p in python3.13 "$$HOME"/.pyenv/versions/3.13*/bin/python; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
LATEST ?= .venv-latest
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
PIP := -m pip --disable-pip-version-check install --quiet
# Tests and examples run on virtual CPU devices, whatever the machine has.
export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.PHONY: help setup run test lint types docs unit test-latest notebooks fuzz bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## make the virtual environment with the tested versions

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "ckpt_jax needs Python 3.11 or newer; none found (set PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

run: setup ## the main job: train on 4 processes, kill one, resume on 2, prove it bitwise
	$(BIN)/python -m ckpt_jax.examples.survive

test: setup lint types unit ## everything: format, lint, types, unit and multi-process tests, notebooks

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

docs: setup ## the documentation as a site in build/site; make unit builds it too
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: setup ## the tests alone, on WORKERS processes (2)
	$(BIN)/python $(PYTEST)

test-latest: ## the tests on Python 3.13 with the newest jax, flax and Orbax
	@if [ -z "$(PYTHON313)" ]; then echo "skipped: no Python 3.13 here (set PYTHON313=...)"; else \
	  $(PYTHON313) -m venv $(LATEST) && \
	  $(LATEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[dev]' && \
	  $(LATEST)/bin/python $(PYTEST); fi

notebooks: setup ## execute the notebooks and write their outputs (2 minutes)
	$(BIN)/python tests/notebooks.py

fuzz: setup ## the property tests with new random examples, and 200 random programs of several Checkpointers
	HYPOTHESIS_PROFILE=random CKPT_JAX_PROGRAMS=200 $(BIN)/python $(PYTEST) \
	  $$(grep -rlE 'hypothesis|CKPT_JAX_PROGRAMS' --include='test_*.py' tests)

bench: setup ## measure side by side with raw Orbax (25 minutes); writes docs/bench.json, bench-*.png and the tables
	$(BIN)/python -m ckpt_jax bench suites -o docs/bench.json --plot docs/bench.png \
	  --fill docs/benchmarks.md --fill README.md

clean: ## remove environments and caches
	rm -rf $(VENV) $(LATEST) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
