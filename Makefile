# Everything a user or CI runs. `make demo` and `make test` set up what they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HOME_DIR ?= marm-home
STAMP := $(VENV)/.installed

.PHONY: demo test check serve train bench install sharded clean

demo: $(STAMP)  ## Simulate, train, serve and give feedback once; ends with one JSON line.
	$(BIN)/marm demo --fresh --home $(HOME_DIR)

test: $(STAMP)  ## All tests.
	$(BIN)/python -m pytest

check: $(STAMP)  ## Format, lint, types, import contracts, spelling.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $(shell git ls-files '*.py' '*.md' '*.yaml' '*.toml')

serve: $(STAMP)  ## Serve what is in marm-home on http://127.0.0.1:8000.
	$(BIN)/marm serve serve_config.yaml

train: $(STAMP)  ## Train on the log in marm-home.
	$(BIN)/marm train --home $(HOME_DIR)

bench: $(STAMP)  ## make bench DATA=ratings.parquet
	$(BIN)/python -m benchmarks.paper.movielens --data $(DATA)

install: $(STAMP)

sharded: $(STAMP)  ## What sharded tables need; without --no-deps pip would bring CUDA along.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[sharded]'
	$(BIN)/python -m pip install --quiet --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:  ## Remove the environment and caches; never a home.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
