# Everything runs in .venv, made on first use. PYTHON chooses the interpreter, TORCH the torch to install.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: all demo test test-fast soak sanitize docs dist check fix clean

all: .venv/installed

.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	# The folders stand at the root but install under safeshard: show them to mypy and import-linter by that name.
	mkdir -p .venv/typing/safeshard
	for name in streamer kernels manifests bench; do ln -sfn "$(CURDIR)/$$name" .venv/typing/safeshard/$$name; done
	for file in safeshard/*; do ln -sfn "$(CURDIR)/$$file" .venv/typing/$$file; done
	touch $@

demo: .venv/installed
	$(BIN)/python -m safeshard.bench.demo

# Two processes of one thread each: torch's threads in both would crowd each other out. The slowest tests are shown.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
test: .venv/installed
	$(PYTEST) --durations=20

# What a change to one file needs.
test-fast: .venv/installed
	$(PYTEST) -m "not slow" tests --ignore=tests/faults --ignore=tests/bench

# FAULTS times as many faults and fuzzed files as the tests take; faults at places that differ from run to run, which
# SEED repeats.
FAULTS ?= 20
SEED ?= $(shell date +%s)
soak: .venv/installed
	SAFESHARD_FAULTS=$(FAULTS) SAFESHARD_FAULTS_SEED=$(SEED) SAFESHARD_SOAK=$(FAULTS) $(BIN)/pytest tests/faults tests/fuzz

# Kernels compiled as for a device and run on the CPU, each access checked against its tensor, and programs against each
# other: ttsem asks for a newer Python and Triton than it needs.
sanitize: .venv/installed
	$(BIN)/python -c 'import ttsem' 2>/dev/null || $(BIN)/pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0
	$(BIN)/python -m ttsem.sanitize pytest $(SANITIZED:%=tests/kernels/test_%.py) -k "triton and not golden" -q
SANITIZED := coded compensation dense gate gram merge projection selection

# The site, in build/site/VERSION. Before it is built: links lead somewhere, tables are made from rows and options, and
# every command that a page shows runs on small models, unless the page says why not.
docs: .venv/installed
	$(BIN)/python -c 'import zensical' 2>/dev/null || $(BIN)/pip install --quiet --editable ".[dev,docs]"
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/documents tests/test_documents.py tests/bench/test_rows.py
	$(BIN)/python docs/publish.py site

# A wheel and an sdist in dist/ whose README and metadata name the repository: make dist REPOSITORY=https://host/org/name
dist: .venv/installed
	@test -n "$(REPOSITORY)" || { echo "make dist REPOSITORY=https://host/org/name"; exit 2; }
	$(BIN)/python -c 'import build.env, twine' 2>/dev/null || $(BIN)/pip install --quiet --editable ".[dev,docs]"
	$(BIN)/python docs/publish.py dist "$(REPOSITORY)"

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .venv/typing && ../bin/mypy --config-file ../../pyproject.toml -p safeshard
	cd .venv/typing && ../bin/lint-imports --config ../../pyproject.toml

fix: .venv/installed
	$(BIN)/python tests/stubs.py
	$(BIN)/python tests/documents/reference.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist *.egg-info
