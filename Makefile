# Every target runs in .venv, which `make install` creates; nothing needs to be set up by hand.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
OUT    ?= quickstart-out
NAME   ?= eval_speed
ARGS   ?=

.PHONY: install quickstart test check format bench clean upstream-tests

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/softverb quickstart --out $(OUT) $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

upstream-tests: install
	$(BIN)/python -m pytest -m upstream tests/plugin $(ARGS)

clean:
	rm -rf $(VENV) build dist quickstart-out .pytest_cache .mypy_cache .ruff_cache
