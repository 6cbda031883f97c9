# One command per task; CI calls `make test`. Everything runs in .venv, which is made with pip from requirements/*.txt.

# The first Python that is new enough; PYTHON= selects another one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; exit; }; done; echo python3)
PY := .venv/bin/python
PROTOS := $(wildcard proto/tablewire/v1/*.proto)
LOCK := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header pyproject.toml
UPGRADE ?=
# How many test files run at a time; most of their time is waiting. ARGS=-n0 runs them in one process.
WORKERS ?= 2
ARGS ?=
SEEDS ?= 0
SECONDS ?= 60
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help venv demo cluster demo-picture check test proto lock bench bench-core sim compose-test compose-ready preflight run-ready

help: ## list the commands
	@echo 'usage: make COMMAND'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

venv: preflight ## create .venv with everything, including development tools
	@"$(PYTHON)" deploy/venv.py dev

demo: run-ready ## a complete cluster on this machine, with two kills; about two minutes: ARGS="--seconds 20 --plain"
	@exec $(PY) -m deploy.local.demo $(ARGS)

cluster: run-ready ## the demo's cluster, running until Ctrl-C, to play with
	@exec $(PY) -m deploy.local.playground $(ARGS)

demo-picture: venv ## record docs/images/demo.svg from a real demo run
	@exec $(PY) -m docs.tools.demo_picture docs/images/demo.svg

check: venv ## lint, types, unit tests, a short simulation; less than two minutes
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m tests.sim --seconds 10
	@exec $(PY) -m pytest -q -n $(WORKERS) --dist loadfile -m 'not integration and not harness' $(ARGS)

test: venv ## everything that CI runs, with real etcd and PostgreSQL servers
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m tests.sim --seconds 30
	@exec $(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

proto: venv ## generate tablewire/v1 from the .proto files
	@$(PY) -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

lock: venv ## write requirements/*.txt from pyproject.toml; UPGRADE=--upgrade takes newer releases
	@$(LOCK) $(UPGRADE) --extra local --group dev --output-file requirements/dev.txt
	@$(LOCK) $(UPGRADE) --extra local --group build --constraint requirements/dev.txt --output-file requirements/run.txt

bench: venv ## the benchmarks, as one line of JSON
	@exec $(PY) -m tests.bench $(ARGS)

bench-core: venv ## the benchmarks of the scheduler core alone
	@exec $(PY) -m tests.bench.core $(ARGS)

sim: venv ## the core and the agents under random faults: SEEDS=100 (0: as many as fit) SECONDS=60
	@exec $(PY) -m tests.sim --seeds $(SEEDS) --seconds $(SECONDS) $(ARGS)

compose-test: compose-ready ## run deploy/compose.yaml on a Docker engine of its own, with kills and a comparison; needs root
	@exec $(PY) -m pytest -x -o timeout=900 tests/compose $(ARGS)

compose-ready: preflight
	@"$(PYTHON)" tests/compose/preflight.py
	@"$(PYTHON)" deploy/venv.py dev

preflight:
	@command -v "$(PYTHON)" >/dev/null || { echo 'tablewire: no $(PYTHON) on this machine: install python 3.11 or newer' >&2; exit 1; }
	@"$(PYTHON)" deploy/local/preflight.py

run-ready: preflight
	@"$(PYTHON)" deploy/venv.py run
