PYTHON ?= python3
PROMPT ?= it-was
VENV := .venv
READY := $(VENV)/.ready
READY_SGLANG := $(VENV)/.ready-sglang
READY_QUANTIZATION := $(VENV)/.ready-quantization
RUNTIME ?= hf
RESULTS ?= $(shell $(VENV)/bin/python bench/machine.py)
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: docs demo test test-slow families lint bench bench-compare bench-growth bench-training bench-forward bench-alternatives bench-trainer bench-large-start bench-directions bench-waiting bench-serve bench-serve-learning bench-countdown bench-engine bench-sass bench-host bench-quantization test-quantization leaderboard bench-figures bench-gpu reproduce-small dist crash-test verify-sglang test-gpu gpu-day test-versions clean

demo: $(if $(filter sglang,$(RUNTIME)),$(READY_SGLANG),$(READY))  ## fine-tune a small model on film reviews; RUNTIME=sglang
	$(VENV)/bin/mezo demo --prompt $(PROMPT) --runtime $(RUNTIME)

test: $(READY_SGLANG)  ## every test that needs no GPU and is not slow, SGLang's engine on the CPU included
	OMP_NUM_THREADS=1 MEZO_REQUIRE_SGLANG=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not gpu and not slow"

test-slow: $(READY_SGLANG)  ## the long tests that `make test` leaves out; their outcome under bench/results/
	MEZO_REQUIRE_SGLANG=1 $(VENV)/bin/python -m pytest -m "slow and not gpu" -rpfE --tb=short --durations=0 \
		--durations-min=1 > $(RESULTS)/test_slow.txt; code=$$?; cat $(RESULTS)/test_slow.txt; exit $$code

docs: $(READY) requirements-docs.txt  ## the documentation as a site in site/, without a network once its packages are there
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/python -m mkdocs build --quiet

families: $(READY_SGLANG)  ## write what `mezo models` and README say of each model family, from runs; ten minutes
	MEZO_RECORD_FAMILIES=1 $(VENV)/bin/python -m pytest -m "slow or not slow" tests/runtimes/sglang/test_every_family.py
	MEZO_RECORD_FAMILIES=1 $(VENV)/bin/python -m pytest tests/models/test_every_family.py

test-versions: $(READY)  ## tests by the oldest and the newest transformers and Triton, an hour; ARGS="--whole python3.13 --ends newest": every quick test, torch too, half an hour an end
	$(VENV)/bin/python bench/versions.py --output $(RESULTS)/versions.json $(ARGS)

lint: $(READY)  ## style, without changing anything
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)  ## the fused ops against their peers; JSON under bench/results/
	$(VENV)/bin/python -m pytest bench --benchmark-quiet --benchmark-json=$(RESULTS)/bench.json

bench-compare: $(READY)  ## fails where an op's ratio to the copy of its run fell by 10 %; BASE=old.json [NEW=new.json]
	@test -n "$(BASE)" || { echo "give the older result: make bench-compare BASE=path/to/old.json"; exit 2; }
	$(VENV)/bin/python bench/compare.py $(BASE) $(or $(NEW),$(RESULTS)/bench.json)

bench-growth: $(READY)  ## cost over parameters, tensors and updates; JSON under bench/results/
	$(VENV)/bin/python bench/growth.py --output $(RESULTS)/growth.json

bench-training: $(READY_SGLANG)  ## a training step as a whole, beside the original's, and how it grows; JSON under bench/results/
	$(VENV)/bin/python bench/training_step.py --output $(RESULTS)/training_step.json

bench-forward: $(READY)  ## forward passes of a step in CPU seconds of one thread, beside the original's; JSON under bench/results/
	$(VENV)/bin/python bench/forward.py --output $(RESULTS)/forward.json

bench-alternatives: $(READY_SGLANG)  ## memory and seconds of a step: inference, MeZO, AdamW; JSON under bench/results/
	$(VENV)/bin/python bench/alternatives.py --output $(RESULTS)/alternatives.json

bench-trainer: $(READY)  ## memory of a step in transformers' Trainer, MeZO beside AdamW, and bytes exchanged; JSON under bench/results/
	$(VENV)/bin/python bench/trainer.py --output $(RESULTS)/trainer.json

bench-large-start: $(READY)  ## seconds and memory of the start of a run on two million rows; JSON under bench/results/
	$(VENV)/bin/python bench/large_start.py --output $(RESULTS)/large_start.json

bench-directions: $(READY)  ## cost and gain of a direction for each group of a batch; JSON under bench/results/
	$(VENV)/bin/python bench/directions.py --output $(RESULTS)/directions.json

bench-sass: $(READY)  ## instructions, registers and limits of the kernels for an H100, counted in machine code; no GPU needed
	$(VENV)/bin/python bench/sass.py --output bench/results/model/sass.json

bench-host: $(READY)  ## CPU time of a step on 448 tensors before its kernel, step_ beside Plan; JSON under bench/results/
	$(VENV)/bin/python bench/host.py --output $(RESULTS)/host.json

bench-distributions: $(READY)  ## CPU time of perturb_ along normal and Rademacher z, beside a copy; JSON under bench/results/
	$(VENV)/bin/python bench/distributions.py --output $(RESULTS)/distributions.json

bench-waiting: $(READY)  ## a step whose threads spin or sleep where they wait, beside busy processes; JSON under bench/results/
	$(VENV)/bin/python bench/waiting.py --output $(RESULTS)/waiting.json

bench-serve: $(READY_SGLANG)  ## throughput and waits of users of mezo serve at three loads, training off and on; JSON under bench/results/
	$(VENV)/bin/python bench/serve.py --output $(RESULTS)/serve.json $(ARGS)

bench-serve-learning: $(READY_SGLANG)  ## a task learnt while users are served, each answer checked; and with two ranks; JSON under bench/results/
	$(VENV)/bin/python bench/serve_learning.py --output $(RESULTS)/serve_learning.json $(ARGS)

bench-countdown: $(READY_SGLANG)  ## a population of directions on a reward, in one batch and one after another; JSON under bench/results/
	$(VENV)/bin/python bench/countdown.py --output $(RESULTS)/countdown.json $(ARGS)

bench-engine: $(READY_SGLANG)  ## the engine on a CPU: packed weights, attention and adapters together; JSON under bench/results/
	$(VENV)/bin/python bench/engine.py --output $(RESULTS)/engine.json $(ARGS)

test-quantization: $(READY_QUANTIZATION)  ## the tests of quantised bases, bitsandbytes' formats included
	$(VENV)/bin/python -m pytest -m "not gpu" tests/models/test_quantization.py

bench-quantization: $(READY_QUANTIZATION)  ## memory, accuracy and CPU seconds by the base's format; JSON under bench/results/
	$(VENV)/bin/python bench/quantization.py --output $(RESULTS)/quantization.json $(ARGS)

leaderboard: $(READY)  ## accuracy at equal forward passes, what is missing of it; RUNS=folder ARGS="--task tweet --rows mezo xs-32 --budgets 5000"
	$(VENV)/bin/python bench/leaderboard.py --runs $(or $(RUNS),runs/leaderboard) --output $(RESULTS)/leaderboard.json \
		--markdown LEADERBOARD.md $(ARGS)

bench-figures: $(READY)  ## figures of bench/results/<machine>/ from its JSON alone
	$(VENV)/bin/python bench/figures.py $(RESULTS)

bench-gpu:  ## bench and bench-growth on a CUDA device, in the current environment; JSON and figures under bench/results/<gpu>/
	folder=$$($(PYTHON) bench/machine.py cuda) && \
	$(PYTHON) -m pytest $(wildcard bench/bench_*.py) --device cuda --benchmark-quiet --benchmark-json=$$folder/bench.json && \
	$(PYTHON) bench/growth.py --device cuda --output $$folder/growth.json && \
	$(PYTHON) bench/figures.py $$folder

reproduce-small: $(READY)  ## what needs no hub account: few-shot runs on film reviews, beside peers; JSON under bench/results/
	$(VENV)/bin/python bench/reproduce_small.py --output $(RESULTS)/reproduce_small.json

dist: $(READY)  ## wheel and sdist under dist/, and the install page from the wheel in a new environment; ARGS="--whole" for each extra
	$(VENV)/bin/python bench/dist.py $(ARGS)

crash-test: $(READY)  ## a run killed at 30 random moments ends like one left alone; JSON under bench/results/
	$(VENV)/bin/python bench/crash_test.py --moments 30 --steps 20000 --output $(RESULTS)/crash_test.json

verify-sglang: $(READY_SGLANG)  ## the SGLang runtime against transformers, reuse, overhead; JSON under bench/results/
	$(VENV)/bin/python bench/verify_sglang.py --again --output $(RESULTS)/verify_sglang.json

test-gpu:  ## the tests that need a CUDA or ROCm device, in the current environment
	$(PYTHON) -m pytest -m gpu tests/kernels
	! $(PYTHON) -c "import sglang" 2>/dev/null || $(PYTHON) -m pytest -m gpu tests/runtimes

gpu-day:  ## all that a GPU can tell, part by part, without a network; JSON under bench/results/<gpu>/; ARGS=--rehearse without a GPU
	$(PYTHON) bench/gpu_day.py $(ARGS)

$(READY): requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(READY_QUANTIZATION): $(READY) requirements-quantization.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements-quantization.txt
	touch $@

# SGLang's own pins want CUDA packages, so it comes without its dependencies; its kernel package has no build for CPUs
$(READY_SGLANG): $(READY) requirements-sglang.txt $(wildcard tests/sgl_kernel_names/*.* tests/sgl_kernel_names/*/*.py)
	$(VENV)/bin/python -m pip install --quiet --constraint requirements.txt --requirement requirements-sglang.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps sglang==0.5.23 torchvision==0.15.2 ./tests/sgl_kernel_names
	touch $@

clean:  ## remove the environment and caches, never runs
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
