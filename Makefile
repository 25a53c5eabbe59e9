# Everything a newcomer or CI needs. Each target makes .venv first, from constraints.txt.
#
#   make demo    the whole road on this machine: data, tokenizers, training, resume, report
#   make check   format, lint, types, fast tests (under 3 minutes)
#   make test    every test
#   make bench   every script in tests/bench, one JSON line each
#   make prove   every script in tests/prove, the long proofs
#   make clean   removes what make made (runs/ stays)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo check lint types test bench prove clean

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-input
# A change of either file makes a new stamp, and so a new install.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# Declared by tinysoundfont but only used to play sound live; it needs PortAudio's headers to build.
TINYSOUNDFONT := tinysoundfont==0.3.7

# Seconds one test may take before it is stopped with a stack of every thread.
TEST_TIMEOUT := 600
# Two workers; the tests of one file stay together, because they share fixtures.
PYTEST := $(PY) -m pytest --timeout $(TEST_TIMEOUT) -n 2 --dist loadfile

# One thread a process: runs use several processes, and results do not depend on it.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=; \
	for name in $${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do \
	  if command -v "$$name" >/dev/null && "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python="$$name"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python 3.11 or newer found (looked for python3, python3.11 to python3.14)" >&2; \
	  echo "  next:  install one, or run: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if [ ! -x $(PY) ]; then \
	  echo "making $(VENV) with $$($$python --version)"; \
	  "$$python" -m venv $(VENV) >/dev/null 2>$(VENV).log || { \
	    cat $(VENV).log >&2; rm -rf $(VENV); \
	    echo "error: $$python cannot make a virtual environment" >&2; \
	    echo "  next:  on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	  rm -f $(VENV).log; \
	fi
	@echo "installing ringweave and its packages (first time: about 6 GB and a few minutes)"
	@( while sleep 20; do echo "  still installing, $$SECONDS s"; done ) & words=$$!; \
	trap 'kill $$words 2>/dev/null || true' EXIT; \
	$(PIP) -c constraints.txt -e '.[demo,test]' && $(PIP) --no-deps $(TINYSOUNDFONT)
	@rm -f $(VENV)/.installed-*
	@touch $@
	@echo "installed"

demo: $(STAMP)
	$(PY) -m ringweave.launch.cli demo --out runs/demo

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The package is mapped onto the folders by pyproject.toml, which mypy cannot follow: give it links instead.
FOLDERS := pretrain parallel kernels tokenizers data_pipes launch
types: $(STAMP)
	@mkdir -p .typecheck/ringweave
	@for folder in $(FOLDERS); do ln -sfn ../../$$folder .typecheck/ringweave/$$folder; done
	MYPYPATH=.typecheck $(PY) -m mypy --cache-dir .mypy_cache -p ringweave

check: lint types
	$(PYTEST) -m 'not slow and not gpu'

test: $(STAMP)
	$(PYTEST) --durations=25 --durations-min=10

# $(call scripts,folder,word): runs every script of a folder; all run, then it fails if one failed.
define scripts
	@found=0; failed=; \
	for script in $(1)/*.py; do \
	  case "$$script" in */_*|*/conftest.py|*'*'*) continue;; esac; \
	  found=1; echo "# $$script" >&2; \
	  $(PY) "$$script" || failed="$$failed $$script"; \
	done; \
	if [ "$$found" -eq 0 ]; then echo "no $(2) yet: $(1)/ has no scripts"; fi; \
	if [ -n "$$failed" ]; then echo "error: failed:$$failed" >&2; exit 1; fi
endef

# The rivals come with the extra `bench`; without them (no network) their benchmarks say "skipped".
bench: $(STAMP)
	@$(PIP) -c constraints.txt -e '.[bench]' || echo "no rivals: pip failed" >&2
	$(call scripts,tests/bench,benchmarks)

prove: $(STAMP)
	$(call scripts,tests/prove,proofs)

clean:
	rm -rf .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis build ./*.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
