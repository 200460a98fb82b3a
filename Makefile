# make setup: the environment, once.  make demo: the tour.  make test: everything the continuous integration runs.
PYTHON ?= python3
WORKERS ?= 2
PYTEST ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.interp-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup demo test lint types unit docs clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# torch first, alone: the pinned build then satisfies every other package's looser requirement.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (1 of 2)"
	@$(PIP) install -c constraints.txt torch
	@echo "installing interp and its dependencies (2 of 2, one or two minutes)"
	@$(PIP) install -c constraints.txt -e ".[bridges,test,docs,dev]"
	@touch $@
	@$(BIN)/interp --version

demo: setup
	@$(BIN)/interp demo

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

# how tests are spread over the workers: tests/conftest.py
unit: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST)

test: lint types unit

# the site, in site/: every page is one that a browser opens from the disk
docs: setup
	$(BIN)/python docs/reference.py --check
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf $(STAMP) build dist demo_out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
