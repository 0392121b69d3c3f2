# make demo   set everything up and play two rounds of self-play; ends with a table and a page
# make test   set everything up, check the style and run the tests
# Options: PYTHON=python3.12 (3.11 to 3.13), TORCH_INDEX_URL=https://... (where torch alone comes from), VENV=folder

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
TORCH ?= torch>=2.11,<2.14
TORCH_INDEX_URL ?=

# The folders kernels/ and engine/ must not shadow packages of the same names.
export PYTHONSAFEPATH := 1

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml kernels/extension.py $(wildcard MANIFEST.in) $(shell find csrc -type f)

.PHONY: help setup demo test lint check-install check-cuda check-triton sanitize soak test-eval clean

help:
	@sed -n '1,3s/^# //p' Makefile

setup: $(VENV)/.installed

demo: setup
	$(BIN)/hermesflow selfplay --config docs/demo.toml run.name=demo

# One worker a core, each in one thread (tests/conftest.py); one that is done takes over what another has left.
WORKERS := -n auto --maxprocesses 8 --dist worksteal

test: lint
	$(BIN)/pytest $(WORKERS)

soak: setup
	$(BIN)/pytest $(WORKERS) -m soak -rP -p no:logging

# In an environment of its own, without the tools of tests: lmms-eval asks for much. It must not change torch.
test-eval: $(VENV)-eval/.installed
	OMP_NUM_THREADS=1 $(VENV)-eval/bin/python tests/lmms_eval/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-install: setup
	VENV=$(VENV) .ci/check-install

check-cuda: setup
	$(BIN)/python .ci/check-cuda

check-triton: setup
	$(BIN)/python .ci/check-triton

# Leaks are not looked for: Python and torch keep memory to the end. Pairs of new and free are torch's own libraries'.
SANITIZERS = $(foreach name,asan ubsan,$(shell $(CXX) -print-file-name=lib$(name).so))
sanitize: setup
	$(BIN)/python tests/csrc/build_extension.py sanitized build/sanitized
	HERMESFLOW_TEST_EXTENSION=build/sanitized/_C.so LD_PRELOAD="$(SANITIZERS)" \
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/pytest tests/kernels -k "cpu and not compiles"

clean:
	rm -rf $(VENV) $(VENV)-eval build *.egg-info kernels/*.so .pytest_cache .ruff_cache
	find benchmarks engine kernels hermesflow tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -m pip install --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)-eval/.installed: $(SOURCES) | $(VENV)-eval/.torch
	$(@D)/bin/python -m pip freeze | grep ^torch== > $(@D)/torch.txt
	$(@D)/bin/python -m pip install --constraint $(@D)/torch.txt --no-build-isolation -e '.[eval]'
	@touch $@

$(VENV)/.torch $(VENV)-eval/.torch:  # by itself and first: the C++ extension is built against the torch that is there
	python=$$(.ci/check-machine $(PYTHON)) && "$$python" -m venv $(@D)
	$(@D)/bin/python -m pip install --upgrade pip setuptools wheel
	$(@D)/bin/python -m pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) '$(TORCH)'
	@touch $@
