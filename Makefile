# Two commands, each from a fresh clone: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check shared clean

quickstart: $(VENV)/ready
	$(BIN)/python -m train.quickstart.run

test: $(VENV)/ready check
	$(BIN)/python -m pytest -n 2 -m "not shared"

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real models, adapters and data; SHARED names the folder that holds them.
SHARED ?= ../shared
shared: $(VENV)/ready
	GENLORA_SHARED=$(SHARED) $(BIN)/python -m pytest -m shared

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) out
