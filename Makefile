# Every target creates .venv from requirements.lock when it is missing or older than the lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help demo test check benchmarks

help:
	@echo "make demo        fuse the bundled model and prove it is the same function (creates .venv first)"
	@echo "make test        run the tests (creates .venv first)"
	@echo "make check       formatting, lint and types: ruff, mypy (creates .venv first)"
	@echo "make benchmarks  every number in the README, measured here"

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: $(READY)
	$(BIN)/skipless demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmarks: $(READY)
	$(BIN)/python benchmarks/bundled.py
