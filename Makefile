# make demo: the paper's idea on the embedded domain, in minutes.   make test: everything that must hold.
PYTHON ?= python3
# what was tested together; VERSIONS=/dev/null takes the newest of everything
VERSIONS ?= constraints.txt
BIN := .venv/bin
READY := .venv/.ready
# tests side by side: one for each core, but 2 at least, and 4 at most, since each takes memory, too
JOBS ?= $(shell n=`env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2`; echo $$(( n < 2 ? 2 : n > 4 ? 4 : n )))
# who has nothing left to do takes over what waits: long tests lie side by side in their files
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=25
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TQDM_MININTERVAL ?= 1

.PHONY: demo test quick slow lab prepare clean sync figures docs

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) on this machine; install Python 3.10 to 3.13, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3,10) <= sys.version_info[:2] <= (3,13))' || { echo "$(PYTHON) is `$(PYTHON) -V`; synthdet needs Python 3.10 to 3.13, so name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c $(VERSIONS) -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/synthdet-run arms=scratch,scratch_long,pretrain n_real=25 out=runs/demo --output runs/demo/demo.ipynb

# one thread per process: notebooks and tests run side by side, and threads that wait for each other's core cost more
# than they bring
test quick slow: export OMP_NUM_THREADS := 1
test: $(READY) sync
	timeout 900 $(BIN)/nbdev_test --do_print --timing --n_workers $(JOBS)
	timeout 1200 $(PYTEST) -m "not slow"

# the rules of the house, the golden values and what each choice promises
quick: $(READY)
	timeout 300 $(PYTEST) -m "not slow" tests/test_house.py tests/test_golden.py tests/test_contract_*.py

# tests that kill processes, run notebooks and servers, or take long
slow: $(READY)
	timeout 1800 $(PYTEST) -m slow

# notebooks and modules say the same, and the notebooks are clean
sync: $(READY)
	$(BIN)/python tests/check_sync.py

# every figure and table, from results/ alone; DATA=FOLDER (below which data/NAME lie): Fig. 2 of photographs, too
FIGURE = $(BIN)/papermill --no-progress-bar
figures: $(READY)
	rm -rf paper_figures/out && mkdir paper_figures/out
	for n in paper_figures/*.ipynb; do $(FIGURE) $$n paper_figures/out/`basename $$n` || exit 1; done
	$(if $(DATA),$(FIGURE) paper_figures/pictures.ipynb paper_figures/out/pictures.ipynb -p data "$(abspath $(DATA))")

# notebooks and docstrings as HTML; a broken link, a picture that was not made or a warning is an error
docs: $(READY)
	$(BIN)/python nbs/pages/build.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

prepare: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	timeout 600 $(BIN)/nbdev_test

clean:
	rm -rf runs build dist _docs *.egg-info .pytest_cache paper_figures/out benchmarks/out
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
