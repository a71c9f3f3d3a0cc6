# One command per chore; `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
RUN     = $(VENV)/.installed-run
DEV     = $(VENV)/.installed-dev
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-one chaos-short chaos alerts check metrics docs format fuzz bench constraints clean

help:  ## list the chores
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(DEV)  ## create .venv with everything for development (the other chores install what they need)

$(RUN): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing what running needs into $(VENV), as pinned in constraints.txt"
	@$(INSTALL) '.[server,cli,embedded]'
	@touch $@

$(DEV): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the tools of tests and checks into $(VENV), as pinned in constraints.txt (a minute)"
	@$(INSTALL) '.[dev]'
	@touch $@ $(RUN)

demo: $(RUN)  ## watch leads travel to a simulated Futwork and back (about 20 seconds)
	@$(BIN)/pipeline demo $(ARGS)

up: $(RUN)  ## run every process in one terminal against the sandbox, until Ctrl-C
	@$(BIN)/pipeline up --sandbox $(ARGS)

test: setup  ## run the test suite: unit, integration, journey; a test whose service is absent skips and says so
	@$(BIN)/python -m pytest -n 6 --dist worksteal $(ARGS)

test-one: setup  ## run the tests of one path in this process, to debug them (T=tests/unit/test_lead.py)
	@$(BIN)/python -m pytest -n 0 $(T) $(ARGS)

chaos-short: setup  ## each experiment of the chaos suite once, in its short form (a few minutes)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m chaos tests/chaos $(ARGS)

chaos: setup  ## kill, cut, fill and mis-set every part under load, and check the promises (some ten minutes)
	@$(BIN)/python -m tests.chaos $(ARGS)

alerts: setup  ## break a pipeline, see each alert fire in a Prometheus and fall silent (some five minutes)
	@$(BIN)/python -m tests.alerts $(ARGS)

check: setup  ## lint, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

metrics: setup  ## write docs/metrics.md from the definitions of the metrics
	@$(BIN)/python -m pipeline.observability.metrics > docs/metrics.md

docs: setup  ## make a site of docs/ with a search, and the reference of commands and code, in var/site
	@$(BIN)/python -c 'import furo, sphinx_click' 2>/dev/null || \
		$(INSTALL) '.[docs]'
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs var/site
	@echo "open var/site/index.html"

format: setup  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

fuzz: setup  ## broken inputs for every reader of what strangers send (a minute; ARGS='600 7': seconds and seed)
	@$(BIN)/python -m tests.fuzz $(ARGS)

bench: setup  ## measure against what people write instead (half an hour; ARGS='enqueue --quick' for a part)
	@$(BIN)/python -m bench $(ARGS)

constraints: setup  ## pin what is installed now
	@$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(pip|setuptools|wheel|futwork-lead-pipeline)\b' > constraints.txt

clean:  ## remove what the chores created (.venv, var, caches)
	rm -rf $(VENV) var .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
