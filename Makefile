# make demo   set up, then the embedded small Llama 4 served on this machine, spoken to, tokens streamed
# make test   set up, then every check and every test
PYTHON ?= python3
VENV ?= .venv
# Where pip finds torch, for a machine without a GPU that reaches the web:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo train-demo test test-slow check protos constraints clean

help:
	@grep -E '^# make' Makefile | cut -c3-

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else f"Drover needs Python 3.10 to 3.13, this is {v[0]}.{v[1]}; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# make demo-options: DEMO_ARGS="--shards 3" and so on, see `drover demo --help`
demo: setup
	$(BIN)/drover demo $(DEMO_ARGS)

test: check
	$(BIN)/python -m pytest

# make test-slow   the tests that take more than half a minute each
test-slow: setup
	$(BIN)/python -m pytest -m slow

# make check   ruff and mypy
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# make protos   the Python stubs from protos/drover/v1/*.proto
protos: setup
	$(BIN)/python -m protos.generate

# make train-demo   the embedded model anew: corpus, tokenizer, training, checkpoint, evaluation (demo/README.md)
train-demo: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[train]'
	$(BIN)/python -m demo.train
	$(BIN)/python -m demo.export
	$(BIN)/python -m demo.evaluate
	$(BIN)/python -m demo.trace
	$(BIN)/python -m demo.compare

# make constraints   new pinned versions of everything (needs uv)
constraints:
	printf 'torch==2.13.0\n' > .torch-pin
	(echo "# The versions that the tests run with, for every supported Python. Made by: make constraints"; \
	 uv pip compile pyproject.toml --universal --python-version 3.10 --extra dev --extra train --quiet --no-annotate --no-header -c .torch-pin \
	 | grep -vE '^(nvidia|cuda|triton|#| )') > constraints.txt
	rm .torch-pin

clean:
	rm -rf $(VENV) .demo
