PYTHON ?= python3
PROMPT ?= it-was
VENV := .venv
READY := $(VENV)/.ready
RESULTS ?= $(shell $(VENV)/bin/python bench/machine.py)
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint bench crash-test test-gpu clean

demo: $(READY)  ## fine-tune a small model on film reviews, from download to plots
	$(VENV)/bin/mezo demo --prompt $(PROMPT)

test: $(READY)  ## every test that needs no GPU
	$(VENV)/bin/python -m pytest -m "not gpu"

lint: $(READY)  ## style, without changing anything
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)  ## the fused ops against their peers; JSON under bench/results/
	$(VENV)/bin/python -m pytest bench --benchmark-json=$(RESULTS)/bench.json

crash-test: $(READY)  ## a run killed at 30 random moments ends like one left alone; JSON under bench/results/
	$(VENV)/bin/python bench/crash_test.py --moments 30 --output $(RESULTS)/crash_test.json

test-gpu:  ## the tests that need a CUDA or ROCm device, in the current environment
	$(PYTHON) -m pytest -m gpu

$(READY): requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:  ## remove the environment and caches, never runs
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
