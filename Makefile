# fedpdm: `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROFILE ?= smoke
JOBS ?= 2
# One more than cores: tests of processes wait for them.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
SIDE_BY_SIDE = -n $(WORKERS) --maxprocesses 8
EXPERIMENT = --profile $(PROFILE) --jobs $(JOBS) $(foreach each,$(METHODS),--method $(each)) $(if $(filter smoke,$(PROFILE)),--results runs/smoke-results)
NOW := $(shell date +%Y%m%d-%H%M%S)
export FLWR_TELEMETRY_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help install docs demo test test-fast test-faults test-mutations deploy-test audit lint licences format bench stop clean \
	experiment-gmm experiment-cifar experiment-colored-mnist experiment-celeba tables

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | \
		awk -F'\t' '{ printf "  make %-26s %s\n", $$1, $$2 }'
	@echo "  variables: FEDPDM_DATA=DIR (torchvision layout), PROFILE=smoke (or cpu, converged, paper), JOBS=2,"
	@echo "  METHODS='alone ours' (default: all),"
	@echo "  WORKERS=2 (default: cores and one), PYTHON=python3, DEMO='--set run.rounds=2' for a shorter one"

install: $(STAMP) ## create .venv and install (Python 3.11 or newer)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedpdm needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: install ## train 4 clients on embedded real digits, epsilon 10, under 9 minutes
	$(BIN)/fedpdm run experiments/digits.yaml --out runs/demo-$(NOW) $(DEMO)

# Workers, and the processes that tests start, read what others have compiled.
test test-fast: export PYTHONDONTWRITEBYTECODE =

test: install ## the whole test suite, WORKERS side by side
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: install ## the tests not marked slow that start no Flower: 3 minutes on two cores
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not flower'

experiment-gmm: install ## Gaussian-mixture toy beside its theory, under a minute (fedpdm toy)
	$(BIN)/fedpdm toy experiments/gmm.yaml --out runs/gmm

experiment-cifar: install ## the paper's CIFAR-10 table, all methods (PROFILE=smoke, JOBS=2)
	$(BIN)/fedpdm experiment experiments/cifar10.yaml $(EXPERIMENT)

experiment-colored-mnist: install ## the paper's Colorized MNIST table, all methods
	$(BIN)/fedpdm experiment experiments/colored-mnist.yaml $(EXPERIMENT)

experiment-celeba: install ## the paper's CelebA table, all methods
	$(BIN)/fedpdm experiment experiments/celeba.yaml $(EXPERIMENT)

tables: install ## docs/results.md from experiments/results/
	$(BIN)/fedpdm tables

audit: install ## attack the release as clients make it: linkage and one-run audit, a minute
	$(BIN)/fedpdm attack linkage --data digits
	$(BIN)/fedpdm attack audit --canaries 5000
	$(BIN)/fedpdm attack audit --canaries 5000 --data digits --clip-norm 8

deploy-test: install ## 3 nodes over gRPC with TLS, one killed, one coordinator restart, under 10 minutes
	$(BIN)/python -m tests.deployment.deploy_run

test-faults: install ## deployed federations with faults, real processes: about half an hour
	$(BIN)/python -m pytest -m faults

test-mutations: install ## take each refusal, clip and noise away: does a test fail? hours (ROOM=wire)
	$(BIN)/python -m tests.mutations $(ROOM)

docs: $(VENV)/.docs ## the documentation site, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev,docs]'
	@touch $@

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

licences: install ## check that every file has licence information (REUSE)
	$(BIN)/reuse lint --lines

format: install ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## speed and memory as ratios, on an idle machine
	$(BIN)/python -m bench

stop: ## end the local Flower and Ray processes that runs of this checkout have started
	@test -x $(BIN)/fedpdm && $(BIN)/fedpdm stop || echo "nothing installed, nothing to stop"

clean: stop ## remove caches and the virtual environment (runs/ is kept)
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
