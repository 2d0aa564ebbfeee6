# make up           installs what is missing and starts Headrace on this machine
# make test         runs the tests
# make all          what CI runs: lint, format, types, tests
# ARGS=...          passes flags on, as in: make up ARGS="--workers 2 --port 9000"

VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCE := shared gateway worker cache-service tests deploy $(wildcard bench)
ARGS   ?=
# test files run side by side, in their order: the long ones are not left for the end
JOBS   ?= 2

export VENV

.PHONY: up test all lint format types bench compose-test install clean

up: $(VENV)/.installed-embedded
	@exec $(BIN)/headrace up $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/headrace pull smollm2
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

all: lint types test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/ruff format --check $(SOURCE)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCE)
	$(BIN)/ruff format $(SOURCE)

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench $(ARGS)

# Docker with a compose command; PROVISION names a script that brings an engine where there is none.
compose-test: $(VENV)/.installed-dev
	$(BIN)/python deploy/compose_test.py $(ARGS)

install: $(VENV)/.installed-dev

# The tests' environment is enough for `up` as well.
$(VENV)/.installed-embedded: pyproject.toml deploy/install.sh
	@if [ -e $(VENV)/.installed-dev ] && [ $(VENV)/.installed-dev -nt pyproject.toml ]; then :; \
	else deploy/install.sh embedded; fi
	@touch $@

$(VENV)/.installed-dev: pyproject.toml deploy/install.sh
	deploy/install.sh dev
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
