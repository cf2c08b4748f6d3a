# Everything runs in .venv, made on first use. PYTHON chooses the interpreter, TORCH the torch to install.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: all demo test soak check fix clean

all: .venv/installed

.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	# The folders stand at the root but install under safeshard: show them to mypy by that name.
	mkdir -p .venv/typing/safeshard
	for name in streamer kernels manifests bench; do ln -sfn "$(CURDIR)/$$name" .venv/typing/safeshard/$$name; done
	touch $@

demo: .venv/installed
	$(BIN)/python -m safeshard.bench.demo

test: .venv/installed
	$(BIN)/pytest

# FAULTS times as many faults as the tests inject, at places that differ from run to run; SEED repeats a run.
FAULTS ?= 20
SEED ?= $(shell date +%s)
soak: .venv/installed
	SAFESHARD_FAULTS=$(FAULTS) SAFESHARD_FAULTS_SEED=$(SEED) $(BIN)/pytest tests/faults

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .venv/typing && ../bin/mypy --config-file ../../pyproject.toml -p safeshard

fix: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist *.egg-info
