# `make` or `make help` lists every habit. Each target sets itself up: all it wants of a machine is Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
ONLY ?=
NAME ?=

.DEFAULT_GOAL := help
.PHONY: help demo example test test-real check bench proto fmt lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "this Python cannot make virtual environments: install its venv package (Debian: python3-venv)"; exit 1; }
	@echo "installing the locked packages into $(VENV) (a minute the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.txt
	@$(BIN)/python -m pip check --quiet --disable-pip-version-check
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP) ## the main job in under a minute: an embedded trust domain, a broker, a caller, a guarded service
	@$(BIN)/action-broker demo

example: $(STAMP) ## a narrated scenario: make example NAME=..., or none for their names
	@test -n "$(NAME)" || { echo "NAME is one of: $(subst _,-,$(sort $(patsubst tests/scenarios/test_%.py,%,$(wildcard tests/scenarios/test_*.py))))"; exit 2; }
	@$(BIN)/python -m pytest -q -s "tests/scenarios/test_$(subst -,_,$(NAME)).py"

test: $(STAMP) ## unit, integration, scenarios, vectors; parts that come as wheels or are on the machine
	@$(BIN)/python -m pytest -q -m "not spire and not slow" tests
	@$(BIN)/python tests/tools/missing_parts.py

test-real: $(STAMP) ## everything, on a real SPIRE, SoftHSM2, cosign and timestamp authority (fetched once)
	@$(BIN)/python tests/tools/build_spire.py
	@$(BIN)/python tests/tools/build_sigstore.py
	@$(BIN)/python tests/tools/get_softhsm.py
	@$(BIN)/python -m pytest -q --real tests

check: $(STAMP) ## lint, types, import contracts, generated code fresh
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python proto/generate.py --check

bench: $(STAMP) ## the budgets as ratios, into build/bench.json; one of them: make bench ONLY=name
	@$(BIN)/python tests/bench/run.py $(ONLY)

proto: $(STAMP) ## regenerate broker/_proto
	@$(BIN)/python proto/generate.py

fmt: $(STAMP) ## format and mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(STAMP) ## resolve the requirement files anew, hashes in, addresses out
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-strip-extras --no-header pyproject.toml -o requirements.txt
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-strip-extras --no-header pyproject.toml --group dev -c requirements.txt -o requirements-dev.txt

clean: ## remove what was built here (not the cache of SPIRE)
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
