# Everything a newcomer needs: `make quickstart` and `make test` install what they need first.
PYTHON ?= python3
VENV := .venv
VENV_GPU := .venv-gpu
BIN := $(VENV)/bin
TORCH := torch==2.13.0+cpu
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps

.PHONY: install sandbox browser quickstart test test-fast test-slow test-thorough test-times install-gpu has-gpu test-gpu check-gpu-wheel plan-check chaos soak break-check lint format lock bench-check docs clean

install: $(VENV)/installed sandbox

# Code rewards run behind bubblewrap; everything else works without it.
sandbox:
	@command -v bwrap >/dev/null || echo "bubblewrap, for the sandbox of code rewards"
	@command -v bwrap >/dev/null || (apt-get install -y -qq bubblewrap || (apt-get update -qq && apt-get install -y -qq bubblewrap)) >/dev/null 2>&1 \
	  || echo "warning[W308] no bubblewrap: code rewards will be refused. Fix: install the package bubblewrap"

# The report's page is tested in a real browser; without one those tests are skipped.
browser:
	@command -v chromium >/dev/null || (apt-get install -y -qq chromium || (apt-get update -qq && apt-get install -y -qq chromium)) >/dev/null 2>&1 \
	  || echo "no chromium: the tests of the report's page are skipped"

# --no-deps: the lock is complete, and resolving would pull in CUDA builds of torchvision and its like (see cpu.in).
$(VENV)/installed: requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and f"error[E702] version out of range — python. Found {v[0]}.{v[1]}, expected 3.11 (the lock was made for it). Fix: make PYTHON=python3.11")'
	@echo "1/5  an environment for Python: $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/5  $(TORCH), 200 MB"
	@$(PIP) $(TORCH) || $(PIP) --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	@echo "3/5  uv, which installs the rest in parallel"
	@$(PIP) uv
	@echo "4/5  the $$(grep -c == requirements/cpu.lock) packages of requirements/cpu.lock, vLLM, Ray and DeepSpeed among them: a minute or two"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode --requirement requirements/cpu.lock
	@echo "5/5  the command: $(BIN)/millrace"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

quickstart: install
	$(BIN)/python launch/run.py launch/configs/quickstart.toml

# Three processes on two cores: whoever starts vLLM, Ray or DeepSpeed waits half of the time.
PYTEST := $(BIN)/python -m pytest -q --numprocesses 3 --dist loadscope --no-loadscope-reorder

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not stack and not process and not slow"

# What is long by nature.
test-slow: install browser
	$(PYTEST) -m "slow and not chaos"

# Tests of properties, with a hundred examples each in place of fifteen.
test-thorough: install
	$(PYTEST) -m "hypothesis and not slow and not chaos" --hypothesis-profile=thorough

# Seconds of `make test` by file and by shared fixture, of imports and of cold starts.
test-times: install
	$(PYTEST) --times
	$(BIN)/python -m tests.cold_starts

# Every row of the fault matrix: faults inflicted on parts and on whole runs.
chaos: install
	$(BIN)/python -m pytest -q -m "chaos or not chaos" tests/test_chaos.py tests/test_resume_stack.py tests/test_fleet_stack.py \
	  tests/test_link_stack.py tests/test_killed_starts_stack.py \
	  tests/test_hosts_stack.py tests/test_checkpoints.py tests/test_resume.py tests/test_engine_pool.py tests/test_fleet.py \
	  tests/test_traffic.py tests/test_reward_pool.py tests/test_sandbox.py

# The packages for GPUs, in an environment of their own.
install-gpu: $(VENV_GPU)/installed

$(VENV_GPU)/installed: requirements/gpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV_GPU)
	$(VENV_GPU)/bin/python -m pip install --disable-pip-version-check --quiet uv
	$(VENV_GPU)/bin/uv pip install --quiet --python $(VENV_GPU)/bin/python --compile-bytecode --requirement requirements/gpu.lock
	$(VENV_GPU)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

# Everything that needs GPUs; what there are too few for is skipped, but without any it fails, before it installs.
test-gpu: has-gpu
	@$(MAKE) --no-print-directory install-gpu
	MILLRACE_TEST_GPU=1 $(VENV_GPU)/bin/python -m pytest -q -rs tests/gpu

has-gpu:
	@nvidia-smi --list-gpus 2>/dev/null | grep -q GPU || { \
	  echo "error[E501] no GPU — make test-gpu. Found none that nvidia-smi lists, expected at least one. Fix: run it where there is one" >&2; exit 1; }

# Downloads vLLM's CUDA wheel (326 MB): what we import from it is what the tests ran on, and takes the arguments that we give.
check-gpu-wheel: install
	$(BIN)/python -m tests.gpu_wheel

# The planner against real runs, four rounds of them, and the simulator: an hour on a quiet machine.
plan-check: install
	$(BIN)/python tests/plan_accuracy.py

# Ten minutes of the quickstart under random faults; SOAK="--seed 1 --minutes 30" for more.
soak: install
	$(BIN)/python tests/soak.py $(SOAK)

# Deliberate mistakes in all packages, one at a time: `make test` must find each. ONLY="NAME NAME" for some of them.
break-check: install
	$(BIN)/python tests/break_check.py $(if $(ONLY),--only $(ONLY))

# Ratios to the ceilings against the stored ones; some four minutes on a quiet machine.
bench-check: install
	$(BIN)/python -m launch.bench check

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The documentation site, into site/index.html; its reference is generated from the code.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

LOCK := uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header

lock:
	$(LOCK) requirements/cpu.in --override requirements/excluded.txt --output-file requirements/cpu.lock
	$(LOCK) requirements/gpu.in --output-file requirements/gpu.lock

clean:
	rm -rf $(VENV) $(VENV_GPU) build site *.egg-info
