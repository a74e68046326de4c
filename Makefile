PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/

.PHONY: demo test test-slow lint bench

# Pictures of the same prompts, in full and with nine of ten tokens cached, and how long each took.
demo: $(STAMP)
	$(RUN)dit-accel demo

test: $(STAMP)
	$(RUN)python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(RUN)python -m pytest -m slow

lint: $(STAMP)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

bench: $(STAMP)
	$(RUN)python benchmarks/generation.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
