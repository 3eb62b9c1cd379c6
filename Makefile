# `make demo` and `make test` are all a new machine needs: Python 3.10+ and make.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(abspath $(VENV))/bin
# the environment is renewed when a dependency file changes, or the project moves
KEY    := $(shell (cat settings.ini setup.py; pwd) | cksum | cut -d' ' -f1)
READY   = $(VENV)/.ready-$(KEY)
export PATH := $(BIN):$(PATH)
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test book env lab readme clean

# seed 0: the first of the twenty in nbs/bench/specialists.csv
demo: env            ## two specialists and three labels a class become one student: table, curves, run folder
	@mkdir -p results
	papermill nbs/run_experiment.ipynb results/specialists.ipynb -p preset specialists -p seed 0
	@asibkd show
	@echo "The executed notebook, with table and curves: results/specialists.ipynb"

test: env            ## every notebook, then the tests of doors, faults and the house
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	pytest -q -n 2 --dist worksteal
	python nbs/_readme.py --check

book: env            ## run every chapter and store what it shows: pictures, tables, values
	python nbs/_book.py --workers 2
	nbdev_clean
	python nbs/_readme.py

env: $(READY)

$(READY):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'asibkd needs Python 3.10 or newer; say PYTHON=python3.11 make demo')"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv || echo "uv is not to be had: pip will do, more slowly"
	@if test -x $(BIN)/uv; then VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install -q --compile-bytecode -e ".[dev]"; else $(BIN)/python -m pip install -q -e ".[dev]"; fi
	@rm -f $(VENV)/.ready-*; touch $@

lab: env             ## JupyterLab on the notebooks
	@test -x $(BIN)/jupyter-lab || $(BIN)/python -m pip install -q jupyterlab
	jupyter-lab nbs

readme: env          ## README.md from nbs/index.ipynb
	python nbs/_readme.py

clean:               ## what can be made again; results and checkpoints stay
	rm -rf build dist *.egg-info .pytest_cache $(VENV)
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
