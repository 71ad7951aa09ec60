# Everything happens in .venv beside this file. Targets say what they do and may be repeated.
#
#   make test PYTEST_FLAGS="-n 0 -k plan"   a part of the tests, in one process
#   make test PYTHON=python3.12             with another Python

export PYTHON ?= python3
PYTEST_FLAGS ?=
# One thread per process: tests and the demo start several processes on few cores.
export OMP_NUM_THREADS ?= 1
SCRIPTS = launch/*.sh slurm/*.sbatch slurm/*.example .ci/install .ci/run

.DEFAULT_GOAL := help
.PHONY: help demo test coverage soak check lint format typecheck clean

help:  ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' Makefile | column -t -s '|'

demo:  ## install, then generate a small data set, train on it, score and report
	@.ci/install base
	@echo "== running kdad demo"
	@.venv/bin/python -m kdad_dist demo

test:  ## install with the dev extra, then run the tests
	@.ci/install dev
	@echo "== running the tests"
	@.venv/bin/python -m pytest -n 2 $(PYTEST_FLAGS)

coverage:  ## install with the dev extra, run the tests, then list the lines of the package they miss
	@.ci/install dev
	@echo "== running the tests, counting lines"
	@.venv/bin/python -m coverage erase
	@.venv/bin/python -m coverage run -m pytest -n 2 -m 'not soak and not starves' \
	    $(PYTEST_FLAGS); ended=$$?; \
	    .venv/bin/python -m coverage combine --quiet && .venv/bin/python -m coverage report && exit $$ended

soak:  ## install with the dev extra, then run the long campaigns and write docs/soak.md
	@.ci/install dev
	@echo "== running the campaigns"
	KDAD_SOAK_REPORT=docs/soak.md .venv/bin/python -m pytest -m soak -n 0 $(PYTEST_FLAGS)

check: lint typecheck  ## lint, typecheck, and the tests of the architecture: what a commit needs
	.venv/bin/python -m pytest -q -n 0 tests/architecture

lint:  ## ruff check, formatting, shellcheck
	@.ci/install dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	shellcheck $(SCRIPTS)

format:  ## rewrite the code as ruff formats it
	@.ci/install dev
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

typecheck:  ## pyright on the package and the benchmarks
	@.ci/install dev
	.venv/bin/python -m pyright

clean:  ## remove .venv
	rm -rf .venv
