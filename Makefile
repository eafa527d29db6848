# The one door: people and continuous integration call the same targets.
#   make demo                    set up and run the demo
#   make test                    set up, then lint, types and tests
#   make test-oldest            the tests with the lower bounds of pyproject.toml
#   make tests ARGS="-k lanczos" run some tests
#   make docs                    the documentation site in build/docs
# A stamp file in the virtual environment records an install; it is redone only when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# One process per core, one thread each: quicker than threads on small tensors, and sums come out the same every time.
WORKERS ?= 2
# More arguments for pytest, or for the demo.
ARGS ?=

OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_BENCH := $(VENV)/.installed-bench
# Environments of their own: 6 GB each, removed by `make clean`.
OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
PUBLIC := $(VENV)-public
EMPTY := $(VENV)-wheel

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test install dev lint format types tests test-oldest test-newest test-public test-wheel dist docs bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## set up and run the demo (arguments in ARGS)
	$(BIN)/lightning-plasticity demo $(ARGS)

test: ## set up, then check style, types and tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory tests

install: $(INSTALLED) ## make the virtual environment and install the package

dev: $(INSTALLED_DEV) ## the same, with what the checks need

lint: $(INSTALLED_DEV) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_DEV) ## put style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV) ## check types
	$(BIN)/mypy

# pytest ends with 5 when it collects nothing, so an empty run fails.
tests: $(INSTALLED_DEV) ## run the tests (arguments in ARGS)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-oldest: ## run the tests with the oldest supported versions (6 GB; PYTHON=python3.10 for the oldest Python)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --requirement tests/oldest.txt
	$(OLDEST)/bin/python -m pip install --no-deps --editable .
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --ignore tests/test_benchmarks.py $(ARGS)

test-newest: ## run the tests with the newest versions that pip finds
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager --editable '.[test]'
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --ignore tests/test_benchmarks.py $(ARGS)

test-public: ## train modules of other packages with and without the monitors
	$(PYTHON) -m venv $(PUBLIC)
	$(PUBLIC)/bin/python -m pip install --editable '.[public]'
	$(PUBLIC)/bin/python -m pytest -m public tests/public_modules $(ARGS)

dist: $(INSTALLED_DEV) ## build wheel and sdist in dist/, and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

test-wheel: dist ## install the wheel into an empty environment, without and with extras, and run each command
	rm -rf $(EMPTY)
	$(PYTHON) -m venv $(EMPTY)
	$(EMPTY)/bin/python -m pip install dist/*.whl
	cp tests/smoke.py $(EMPTY) && cd $(EMPTY) && bin/python smoke.py
	$(EMPTY)/bin/python -m pip install "$$(ls dist/*.whl)[report,completion]"
	cd $(EMPTY) && bin/python smoke.py

docs: $(INSTALLED_DEV) ## build the documentation site in build/docs; a warning fails
	$(BIN)/python -m sphinx --conf-dir docs --doctree-dir build/doctrees --fail-on-warning --keep-going --nitpicky . build/docs

bench: $(INSTALLED_BENCH) ## compare speed with other libraries (ARGS="--quick" for a smoke test)
	$(BIN)/python -m benchmarks.peers $(ARGS)

clean: ## remove the virtual environment and what the tools left
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(PUBLIC) $(EMPTY) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[report]'
	touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $(INSTALLED) $@

$(INSTALLED_BENCH): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[bench]'
	touch $(INSTALLED) $@
