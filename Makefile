# `make quickstart` and `make test` need Python 3.11 or newer (PYTHON=… names another) and PyPI.
PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test

quickstart: $(VENV)/installed
	$(VENV)/bin/softprompt quickstart

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e .
	touch $@

$(VENV)/installed-test: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e ".[test]"
	touch $@
