# Every target makes the virtual environment it needs, once: python3 is all that has to be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS_VENV ?= .venv-docs
SITE ?= site
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Arguments of the program that a target runs, e.g. make demo ARGS="--data mnist-mlp".
ARGS ?=
# Processes that share the tests, one a core and at most eight: each holds a torch of its own.
WORKERS ?= auto

.PHONY: demo test lint bench docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/dattri demo $(ARGS)

test: $(VENV)/installed-development
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(VENV)/installed-development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-development
	$(BIN)/python -m pytest tests/benchmarks -m '' --benchmark-only $(ARGS)

# The pages are files in docs/, so that a site needs neither torch nor the package: an environment of
# its own is installed in seconds. SITE is where it is built.
docs: $(DOCS_VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --site-dir $(SITE)

$(DOCS_VENV)/installed: constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/installed-development: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[test,lint,contrib]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(SITE) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
