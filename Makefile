# Two commands a newcomer needs: `make demo` and `make test`. Each sets itself up in .venv.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
             "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# One thread a test process: the tests run two at a time, and tiny tensors gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

.PHONY: demo test test-full lint format quickstart reference docs evidence install clean

demo: $(STAMP)
	$(VENV)/bin/evatool demo

# Unmarked + parity + dist + e2e in a fixed covering subset: at most 10 minutes on 2 cores, no network, no GPU needed.
test: $(STAMP)
	$(PYTEST) -n 2 --dist worksteal -m "not slow"

# Also the slow matrices. Resumable: tests that passed on this very tree are not repeated.
test-full: $(STAMP)
	$(PYTEST) -n 2 --dist worksteal --resume-file .test-full.json --record docs/test-full.md

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The commands of docs/quickstart.md, at debug size.
quickstart: $(STAMP)
	$(PY) tests/helpers/run_quickstart.py

# The pages that are made from the code.
reference: $(STAMP)
	$(VENV)/bin/evatool recipe reference > docs/recipes.md
	$(VENV)/bin/evatool recipe schema > docs/recipe.schema.json
	$(PY) docs/map.py

# The API reference from the docstrings, in build/docs/.
docs: $(STAMP)
	$(PY) docs/make_reference.py

# The runs behind docs/evidence.md, an hour of two cores, and the page. Resumable: a finished run is not repeated.
evidence: $(STAMP)
	$(PY) docs/evidence/run.py

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "evatool needs Python 3.11 or newer; none was found. Install one, or run: make PYTHON=/path/to/python3"; exit 1; }
	@if command -v uv >/dev/null 2>&1; then \
	  echo "installing into $(VENV) with uv"; \
	  uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
	  uv pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[test]'; \
	else \
	  echo "installing into $(VENV) with pip (torch is large: some minutes)"; \
	  { test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }; } && \
	  $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) runs build .pytest_cache .ruff_cache .mypy_cache .hypothesis .test-full.json
