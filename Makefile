# `make help` lists the targets. Everything runs in .venv, which is made anew when pyproject.toml changes.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
CACHE := $(or $(STEP_ORACLE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/step-oracle)
VENV := .venv
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.setup-$(shell sha256sum pyproject.toml | cut -c1-16)
# The oldest supported vLLM, one between, the newest tested.
VLLM_MATRIX ?= 0.18.1 0.25.1 0.33.0
PYTEST_ARGS ?=
# Files of tests at once; 0: in this process, one after the other.
TEST_PROCESSES ?= 2
ACCURACY ?= build/accuracy
# pip tells of every folder in the user's configuration that is not there.
QUIET := grep -v 'WARNING: Location' >&2 || true

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format proto proto-breaking presubmit vllm-env vllm-matrix accuracy closed-loop bench-held bench-thread bench-replay bench guarantees lease-share clean-cache

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 18

setup: $(SETUP) ## Make .venv with this package (editable) and everything needed to develop it

$(SETUP):
	@flock $(CURDIR)/pyproject.toml $(MAKE) --no-print-directory .venv-locked

.PHONY: .venv-locked
.venv-locked:
	@if [ ! -e $(SETUP) ]; then set -e; \
	  echo "making $(VENV) with $(PYTHON)"; \
	  [ -x $(RUN) ] || $(PYTHON) -m venv $(VENV); \
	  rm -f $(VENV)/.setup-*; \
	  $(RUN) -m pip install --quiet --upgrade pip 2> >($(QUIET)); \
	  $(RUN) -m pip install --quiet --editable '.[dev]' 2> >($(QUIET)); \
	  touch $(SETUP); fi

demo: setup ## Two engines on GPUs that are not there, swapped under load; ARGS="--json FILE", ARGS=--help for more
	PYTHONPATH=tests $(RUN) -m deploy.demo.demo $(ARGS)

test: setup ## Run every test but the nightly replays; the first run builds vLLM environments in the cache (minutes)
	$(RUN) -m pytest -m "not nightly" -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-fast: setup ## Run the tests that start no vLLM, replay no runs and take seconds
	$(RUN) -m pytest -m "not vllm and not accuracy and not slow" $(PYTEST_ARGS)

lint: setup proto-breaking ## Check style, types and the wire contract
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/buf lint

format: setup ## Rewrite the code in the project's format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

proto: setup ## Generate the code beside the .proto files anew
	$(RUN) tests/proto_code.py write

proto-breaking: setup ## Refuse changes of the wire contract that break clients of the commit before
	$(RUN) tests/proto_code.py breaking

presubmit: lint test ## What a change must pass

vllm-env: setup ## Build the cached vLLM environments of the matrix
	@for version in $(VLLM_MATRIX); do $(RUN) tests/environments.py $$version || exit 1; done

vllm-matrix: setup ## Serve with every vLLM version of VLLM_MATRIX
	$(RUN) -m pytest -m vllm $(foreach version,$(VLLM_MATRIX),--vllm-version $(version)) $(PYTEST_ARGS) \
	  tests/engines/test_serving.py tests/engines/test_vllm_environment.py

accuracy: setup ## What the models promise on measured data: a table; files and pictures in build/accuracy
	$(RUN) -m pytest tests/accuracy -q -n logical --dist loadfile --accuracy-output $(ACCURACY) $(ARGS)

closed-loop: setup ## A real vLLM on the CPU, captured, and set beside its own emulation; ARGS="--quick", ARGS=--help for more
	PYTHONPATH=tests $(RUN) -m deploy.closed_loop.closed_loop $(ARGS)

bench-held: setup ## How well a held step of 10 ms is held; ARGS="--wait sleep --json FILE"
	PYTHONPATH=tests $(RUN) tests/performance/held_step.py $(ARGS)

bench-thread: setup ## What a step costs the engine thread in our code, with leases and without; ARGS="--json FILE"
	PYTHONPATH=tests $(RUN) tests/performance/engine_thread.py $(ARGS)

lease-share: setup ## Share of steps answered without a message on Azure's traces; ARGS="--data DIR --seconds 600"
	PYTHONPATH=tests $(RUN) tests/performance/lease_share.py $(ARGS)

bench-replay: setup ## How fast measured runs are replayed, one process and several; ARGS="--repeat 3 --json FILE"
	PYTHONPATH=tests $(RUN) tests/performance/replay_speed.py $(ARGS)

bench: setup ## What our code costs, beside what it could cost and what is promised; ARGS="--quick" or "--only kernels"
	PYTHONPATH=tests $(RUN) tests/performance/bench.py $(ARGS)

guarantees: setup ## What is promised, shown in long form (within an hour); ARGS="--quick" or "--only hot_swaps"
	PYTHONPATH=tests $(RUN) -m guarantees.show $(ARGS)

clean-cache: ## Remove the cached environments
	rm -rf $(CACHE)/vllm-* $(CACHE)/proto-* $(CACHE)/core-* $(CACHE)/load-* $(CACHE)/deploy-*
