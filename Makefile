# One verb a task; CI calls `make test`. Everything runs in .venv, which pip alone makes from requirements/*.txt.

# The first python that is new enough; name another one with PYTHON=.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; exit; }; done; echo python3)
PY := .venv/bin/python
PROTOS := $(wildcard proto/tablewire/v1/*.proto)
LOCK := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header pyproject.toml
UPGRADE ?=
# So many files of tests at a time; most of their time is waiting. ARGS=-n0 runs them in one process.
WORKERS ?= 2
ARGS ?=
SEEDS ?= 0
SECONDS ?= 60
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help venv demo cluster demo-picture check test proto lock bench bench-core sim compose-test compose-ready preflight run-ready

help: ## list the verbs
	@echo 'usage: make VERB'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

venv: preflight ## make .venv with everything, development tools included
	@"$(PYTHON)" deploy/venv.py dev

demo: run-ready ## the whole thing on this machine in about two minutes: ARGS="--seconds 20 --plain"
	@exec $(PY) -m deploy.local.demo $(ARGS)

cluster: run-ready ## the demo's cluster, left up to play with until Ctrl-C
	@exec $(PY) -m deploy.local.playground $(ARGS)

demo-picture: venv ## record docs/images/demo.svg from a real demo run
	@exec $(PY) -m docs.tools.demo_picture docs/images/demo.svg

check: venv ## lint, types, unit tests, tidy; less than two minutes
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(if $(wildcard tests/sim/__main__.py),$(PY) -m tests.sim --seconds 10)
	@exec $(PY) -m pytest -q -n $(WORKERS) --dist loadfile -m 'not integration and not harness' $(ARGS)

test: venv ## everything that CI runs, with real etcd and real PostgreSQL
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(if $(wildcard tests/sim/__main__.py),$(PY) -m tests.sim --seconds 30)
	@exec $(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

proto: venv ## generate tablewire/v1 from the .proto files
	@$(PY) -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

lock: venv ## write requirements/*.txt from pyproject.toml; UPGRADE=--upgrade takes newer releases
	@$(LOCK) $(UPGRADE) --extra local --group dev --output-file requirements/dev.txt
	@$(LOCK) $(UPGRADE) --extra local --group build --constraint requirements/dev.txt --output-file requirements/run.txt

bench: venv ## the figures, as one line of JSON
	@exec $(PY) -m tests.bench $(ARGS)

bench-core: $(if $(wildcard tests/bench/core.py),venv) ## the figures of the scheduler core alone
	@$(call later,tests/bench/core.py,$(PY) -m tests.bench.core $(ARGS))

sim: $(if $(wildcard tests/sim/__main__.py),venv) ## the core and the agents under random faults: SEEDS=100 (0: as many as fit in) SECONDS=60
	@$(call later,tests/sim/__main__.py,$(PY) -m tests.sim --seeds $(SEEDS) --seconds $(SECONDS) $(ARGS))

compose-test: compose-ready ## run deploy/compose.yaml for real: a Docker engine of its own, kills, a comparison; needs root
	@exec $(PY) -m pytest -x -o timeout=900 tests/compose $(ARGS)

compose-ready: preflight
	@"$(PYTHON)" tests/compose/preflight.py
	@"$(PYTHON)" deploy/venv.py dev

preflight:
	@command -v "$(PYTHON)" >/dev/null || { echo 'tablewire: no $(PYTHON) on this machine: install python 3.11 or newer' >&2; exit 1; }
	@if [ -e deploy/local/preflight.py ]; then exec "$(PYTHON)" deploy/local/preflight.py; fi

run-ready: preflight
	@"$(PYTHON)" deploy/venv.py run

# $(call later,file that brings it,command)
later = $(if $(wildcard $(1)),exec $(2),echo 'make $@: not in this version, comes with a later one' >&2; exit 1)
