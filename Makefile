# Thin on purpose: the work is in `python -m dyrate_lib`. Variables: SCALE (smoke | full), MODEL, DATA, LMMS, OUT, JOBS, PYTHON, VENV.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
OPTIONS = $(if $(SCALE),--scale "$(SCALE)") $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(LMMS),--lmms "$(LMMS)") $(if $(OUT),--out "$(OUT)") $(if $(JOBS),--jobs "$(JOBS)")

.PHONY: help env soak reproduce figures bench test test-book test-jobs test-newest lint types book wheel lmms clean
.DEFAULT_GOAL := help

help:
	@echo "make reproduce   set up, then compute everything anew (SCALE=smoke without a GPU, full with one) into build/"
	@echo "make test        set up, then lint, unit tests and every committed notebook"
	@echo "make soak        kills, full disks, damaged files and bad input, at length"
	@echo "make test-book   the book's tests alone, in a headless Chromium if one is installed"
	@echo "make test-jobs   the study's jobs through Snakemake, and through SLURM if it is installed"
	@echo "make test-newest the contract tests on transformers' newest release, in an environment of its own"
	@echo "make figures     redraw figures/ from the committed records, on a CPU"
	@echo "make bench       time loops and methods on this machine (BENCH='--batch 16 ...': see python -m dyrate_lib bench --help)"
	@echo "make book        notebooks, reference and an interactive page as static HTML in build/book"
	@echo "make wheel       a wheel in build/dist that works outside the repository"
	@echo "make lint        ruff and mypy; make types mypy alone"
	@echo "make lmms        add lmms-eval, for the official benchmarks (README, From original weights to Tables I and II), and try it"
	@echo "Variables: SCALE=smoke|full MODEL=hub-id-or-folder DATA=coco:/folder LMMS=folder OUT=folder JOBS=2|slurm PYTHON=python3.12 VENV=.venv"

env: $(STAMP)

# torch first: its wheel is the large one, and a download that breaks off later need not repeat it.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q "$$(grep '^torch==' requirements.lock)"
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

reproduce: env $(if $(JOBS),$(VENV)/.jobs)
	$(PY) -m dyrate_lib reproduce $(OPTIONS)

# Snakemake, for JOBS alone.
$(VENV)/.jobs: $(STAMP)
	$(call extra,jobs)
	@touch $@

# Kills, full disks, damage and bad input at length, about twenty minutes on two cores; `make test` holds a short form.
soak: env $(VENV)/.jobs
	$(call extra,fuzz)
	DYRATE_SOAK=full OMP_NUM_THREADS=1 $(PY) -m pytest -q --durations=10 tests/test_soak.py tests/test_fuzz.py tests/test_parallel.py

# What an extra of pyproject.toml asks for, at the versions of the lock file where it names them.
extra = $(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")' \
	    | $(PY) -m pip install --disable-pip-version-check -q -c requirements.lock -r /dev/stdin

figures: env
	$(PY) -m dyrate_lib figures

bench: env
	$(PY) -m dyrate_lib bench $(BENCH)

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "not gpu" tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout 600 notebooks

test-book: env
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_book.py

test-jobs: env $(VENV)/.jobs
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_slurm.py tests/test_parallel.py -k "test_slurm or job"

# Everything that lmms-eval's tasks here need, and lmms-eval without what it asks for besides (another torch's torchvision).
lmms: env
	$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lmms"], sep="\n")' \
	    | grep -v '^lmms-eval' | $(PY) -m pip install --disable-pip-version-check -q -c requirements.lock -r /dev/stdin
	$(PY) -m pip install --disable-pip-version-check -q --no-deps "$$(grep -o 'lmms-eval==[0-9.]*' pyproject.toml)"
	$(PY) -m pytest -q tests/test_lmms_eval.py tests/test_published.py

test-newest: env
	VENV=$(VENV) bash .ci/newest

lint: env types
	$(PY) -m ruff check .

types: env
	$(PY) -m mypy

book: env
	OMP_NUM_THREADS=1 $(PY) -m dyrate_lib -v book

# The environment's own setuptools builds it, so no network is needed.
wheel: env
	rm -rf build/lib build/bdist.* && mkdir -p build/dist
	$(PY) -m pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation -w build/dist .
	@ls -l build/dist/dyrate-*.whl

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
