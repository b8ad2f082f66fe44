# make run: train, pack and score the pocket model on this machine, offline. make check: lint, types, core tests, within a
# minute. make test: lint, types and every test.
PYTHON ?= python3
PY := .venv/bin/python
RUN_ID ?= pocket-$(shell date +%Y%m%d-%H%M%S)
# one process for every core, one thread in each: more would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
# threads wait awake for a moment only: longer, a step would take ten times as long with anything else on the machine
export GOMP_SPINCOUNT := 4000

.PHONY: run check test lint gpu profile lock clean

run: .venv/ready
	$(PY) -m data.localtext
	$(PY) train_gpt.py --recipe pocket --run_id $(RUN_ID)
	$(PY) -m tools.plot runs/$(RUN_ID)
	$(PY) -m tools.summary runs/$(RUN_ID)

check: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# on one GPU, within nine minutes: are the kernels right, how fast is a step, does a run hold together
gpu: SHELL := bash
gpu: .SHELLFLAGS := -o pipefail -c
gpu: .venv/ready
	$(PY) -m data.localtext
	($(PY) -m kernels.check && \
	$(PY) -m tools.bench --modes plain,banded -- --recipe 4b7l --device cuda --micro_batch 64 && \
	$(PY) train_gpt.py --recipe 4b7l --device cuda --data_path data/local --vocab_size 3072 --max_wallclock_seconds 180 --batch_tokens 131072 \
	--score_mode banded --also trained,plain --run_id gpu-$(shell date +%Y%m%d-%H%M%S)) 2>&1 | tee gpu.log

# where the time of a training step goes
profile: .venv/ready
	$(PY) -m data.localtext
	$(PY) -m tools.bench --profile -- --recipe pocket

# the stamp is written last, so an interrupted installation starts again
.venv/ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.lock
	touch $@

# requirements.lock from requirements.txt and requirements-dev.txt, in a fresh environment; its head comment stays
lock:
	rm -rf .cache/lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	.cache/lock/bin/python -m pip freeze --all > .cache/lock/installed
	(grep '^#' requirements.lock; grep -vE '^(pip==|nvidia-|cuda-)' .cache/lock/installed | \
	sed -E 's/^(torch==[0-9.]+).*/\1/; s/^(triton==.*)/\1; platform_system == "Linux" and platform_machine == "x86_64"/') > .cache/lock/new
	mv .cache/lock/new requirements.lock
	rm -rf .cache/lock

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis data/local data/heldout runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
