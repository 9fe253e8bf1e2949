.DEFAULT_GOAL := help
.PHONY: help demo run test faults torture check clean
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
SECONDS ?= 600
BIN := $(VENV)/bin
# Three tests at a time on two cores, as the fault tests mostly wait; files in their order: by size the
# few long ones would come last, alone.
THREE := -n 3 --dist loadfile --no-loadscope-reorder

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(VENV)/.runtime ## Fine-tune the tiny model through POST /jobs and compare before and after
	$(BIN)/python -m examples.demo

run: $(VENV)/.runtime ## Start the service on this machine (Ctrl-C stops it)
	$(BIN)/flatlora up

test: $(VENV)/.dev ## Run the tests; no GPU is needed
	$(BIN)/pytest -m "not gpu" $(THREE)

faults: $(VENV)/.dev ## Run the tests that take long: the longest jobs, each fault many times
	$(BIN)/pytest -m torture tests

torture: $(VENV)/.dev ## Break a cluster at random (SECONDS=600 SEED=n), then look what it has kept
	$(BIN)/python -m tests.faults.torture --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

check: $(VENV)/.dev ## Lint, format, types, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove the environment, caches and the demo's data
	rm -rf $(VENV) .demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "flatlora needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml flatlora/pyproject.toml client/pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ./flatlora -e ./client -e ".[worker]"
	@touch $@

$(VENV)/.dev: pyproject.toml flatlora/pyproject.toml client/pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ./flatlora -e ./client -e ".[dev]"
	@touch $@ $(VENV)/.runtime
