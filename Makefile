# Thin on purpose: the work is in `python -m dyrate_lib`. Variables: SCALE (smoke | full), MODEL, DATA, OUT, PYTHON, VENV.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
OPTIONS = $(if $(SCALE),--scale "$(SCALE)") $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)")

.PHONY: help env reproduce figures test test-newest lint types clean
.DEFAULT_GOAL := help

help:
	@echo "make reproduce   set up, then compute everything anew (SCALE=smoke without a GPU, full with one) into build/"
	@echo "make test        set up, then lint, unit tests and every committed notebook"
	@echo "make test-newest the contract tests on transformers' newest release, in an environment of its own"
	@echo "make figures     redraw figures/ from the committed records, on a CPU"
	@echo "make lint        ruff; make types runs mypy"
	@echo "Variables: SCALE=smoke|full MODEL=hub-id-or-folder DATA=coco:/folder OUT=folder PYTHON=python3.12 VENV=.venv"

env: $(STAMP)

# torch first: its wheel is the large one, and a download that breaks off later need not repeat it.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q "$$(grep '^torch==' requirements.lock)"
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

reproduce: env
	$(PY) -m dyrate_lib reproduce $(OPTIONS)

figures: env
	$(PY) -m dyrate_lib figures

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "not gpu" tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout 600 notebooks

test-newest: env
	VENV=$(VENV) bash .ci/newest

lint: env
	$(PY) -m ruff check .

types: env
	$(PY) -m mypy

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
