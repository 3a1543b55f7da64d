# turbvit_nb. The two commands that matter: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Small FFTs lose to thread switching, and the last bits of a result depend on the number of threads: one unless the caller says otherwise.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak notebooks-clean readme outputs docs docs-check bench hooks clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## the environment in .venv, with pinned versions
$(VENV)/.installed: settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH: install Python 3.11 (3.11.5 or later), or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 12))' || { echo "$(PYTHON) is $$($(PYTHON) -V): the pinned packages want Python 3.11.5 or a later 3.11; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## data, train, prune, roll out, analyse: minutes on two cores; results in runs/demo
	$(BIN)/turbvit demo

test: setup notebooks-clean ## notebooks clean and exported, every notebook run, pytest
	$(BIN)/python tools/notebooks.py
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 40 tests

soak: setup ## the tests that are too long for every commit
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 10 --soak -m soak tests

notebooks-clean: setup ## fail where nbdev_clean, nbdev_export or make readme would change a file
	$(BIN)/python tools/check_sync.py

readme: setup ## README.md from nbs/index.ipynb (no Quarto needed)
	$(BIN)/python tools/readme.py

outputs: setup ## run every notebook top to bottom and keep its outputs
	$(BIN)/python tools/outputs.py

docs: setup ## the site, in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "quarto is not on the PATH: install it from https://quarto.org, then make docs"; exit 1; }
	$(BIN)/python tools/site.py docs

docs-check: setup ## every page as plain HTML, in _proc/_html, read for faults (no Quarto needed)
	$(BIN)/python tools/site.py check

bench: setup ## the benchmarks, one table each
	for f in benchmarks/bench_*.py; do $(BIN)/python $$f || exit 1; done

hooks: setup ## git hooks that clean notebooks on commit and merge
	$(BIN)/nbdev_install_hooks

clean: ## remove what was built (the environment, data and runs stay)
	rm -rf _proc _docs build *.egg-info .pytest_cache
	find turbvit_nb tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +
