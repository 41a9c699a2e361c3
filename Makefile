# The commands of this repository. Each makes .venv first if it is missing (infra/create_venv.sh).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The launchers (deepspeed, ray) start "python" and each other by name.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHON

.PHONY: help demo test lint lock clean venv

help: ## say what there is
	@echo "make demo [ARGS='--source DIR']   from photographs to a picture restored by a model from the registry"
	@echo "make test [ARGS='tests/infra -x'] all tests"
	@echo "make lint                         ruff, import-linter, mypy"
	@echo "make lock [ARGS=--upgrade]        requirements.lock anew from pyproject.toml, keeping its pins unless told"
	@echo "make clean                        remove .venv, caches and the demo's runs; other runs stay"
	@echo "Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA packages."

venv:
	@bash infra/create_venv.sh

demo: venv
	@ird demo $(ARGS)

# Three files at a time, for two cores: many tests wait for other processes or for a disk.
test: venv
	@bash infra/install_test_tools.sh
	@OMP_NUM_THREADS=1 python -m pytest --numprocesses=3 $(ARGS)

lint: venv
	ruff check .
	ruff format --check .
	lint-imports
	mypy

# The local version (+cpu) goes, so that machines with and without a GPU install from the same line.
lock: venv
	@echo "Resolving; takes a minute or two ..."
	@pip-compile --quiet --extra dev --strip-extras --no-annotate --no-header --allow-unsafe \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
		$(ARGS) --output-file requirements.lock pyproject.toml
	@sed -i.bak 's/^\(torch==[0-9.]*\)+[a-z0-9.]*$$/\1/' requirements.lock && rm requirements.lock.bak
	@git diff --stat -- requirements.lock

clean:
	rm -rf .venv runs/demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
