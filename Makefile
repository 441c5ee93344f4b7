# Every target sets up what it needs: nothing but Python (3.10 to 3.13) and a package index has to be there.
PYTHON ?= python3
VENV := .venv
FLOOR := .venv-floor
PARITY := .venv-parity
PAGE := .venv-page
BIN := $(VENV)/bin
PYTEST := -m pytest -n 2
FAST := -m "not slow"

# OpenMP's threads spin while they wait, which slows every other process on the same cores.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-floor test-page parity bench soak lint clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "PYTHON=python3.12 make ... sets up with another Python. Set up already? make clean comes first."

demo: $(VENV)/.demo ## Train on generated scenes, from nothing to an overlay, in a few minutes
	$(BIN)/ctxseg demo

test: lint ## Lint, types and all tests that are not slow
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(FAST)

test-full: lint ## Lint, types and every test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-floor: $(FLOOR)/.dev ## The tests of `make test` on the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python $(PYTEST) $(FAST)

test-page: $(PAGE)/.dev ## The page of scripts/demo_app.py in a real browser: Debian's chromium, or playwright's
	command -v chromium > /dev/null || $(PAGE)/bin/playwright install chromium
	OMP_NUM_THREADS=1 $(PAGE)/bin/python -m pytest -W ignore tests/page  # what gradio's parts warn of is theirs

parity: $(PARITY)/.dev ## Compare converted models with the code bases that their weights come from
	OMP_NUM_THREADS=1 $(PARITY)/bin/python $(PYTEST) -W ignore tests/parity  # what the peers warn of is theirs

bench: $(PARITY)/.dev ## Measure time and memory against the formulas as written and the other code bases
	$(PARITY)/bin/python scripts/benchmark.py --output_dir benchmark

soak: $(VENV)/.dev ## Kill trainings at random moments and in every step of saving; SEED=1 draws others
	OMP_NUM_THREADS=1 CTXSEG_SOAK_SEED=$(or $(SEED),0) $(BIN)/python -m pytest tests/test_kill.py tests/test_survival.py

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove environments, caches and builds (trained runs stay)
	rm -rf $(VENV) $(FLOOR) $(PARITY) $(PAGE) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files .demo and .dev say that an environment is complete; they are renewed when pyproject.toml changes.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --group dev
	touch $@

$(FLOOR)/.dev: pyproject.toml scripts/floor_requirements.py
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --upgrade "pip>=25.1"
	$(FLOOR)/bin/python scripts/floor_requirements.py > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip install --editable ".[demo]" --group dev --constraint $(FLOOR)/constraints.txt
	touch $@

$(PAGE)/.dev: pyproject.toml
	$(PYTHON) -m venv $(PAGE)
	$(PAGE)/bin/python -m pip install --upgrade "pip>=25.1"
	$(PAGE)/bin/python -m pip install --editable . --group page
	touch $@

$(PARITY)/.dev: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --upgrade "pip>=25.1"
	$(PARITY)/bin/python -m pip install --editable . --group parity
	touch $@
