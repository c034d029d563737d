# make quickstart   train a classifier on the embedded digits: progress bar, test table, checkpoint, picture
# make test         run the tests
# make lint         format check, lint, import layers, types
# make readme     write the generated tables of README.md
# Each sets up .venv first, with the tested versions of constraints.txt; nothing else needs to be installed but Python.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: quickstart test lint format readme clean

quickstart: .venv/.package
	$(BIN)/lightning-opt fit

test: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: .venv/.dev
	$(BIN)/python docs/readme.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.venv/.package: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning-opt needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Setting up .venv (once; a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.package
	$(PIP) --editable '.[dev]'
	touch $@
