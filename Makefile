# Short names for the commands that README.md gives. PYTHON chooses the interpreter that makes .venv.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := clcore service tests benchmarks

.PHONY: demo up down install test test-slow check clean

demo: .venv/runtime
	$(BIN)/clpeft demo

up: .venv/runtime
	$(BIN)/clpeft up

down: .venv/runtime
	$(BIN)/clpeft down

install: .venv/dev

test: .venv/dev
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Minutes: parts of a running service are killed, ten times in three runs.
test-slow: .venv/dev
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or chaos"
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --quick --json build/chaos-quick.json

check: .venv/dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/codespell

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps are newer than pyproject.toml while the installation matches it.
.venv/runtime: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch .venv/runtime $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
