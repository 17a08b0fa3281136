# make demo   train the tiny HunyuanVideo with two processes on this machine's CPU, and write a report
#             (make demo ARGS="section.key=value ..." overrides the recipe)
# make test   the tests            make test-fast   without whole runs and slow tests
# make rehearse   the GPU's path on a CUDA made of the host's memory (docs/guides/gpu/rehearsal.md)
# make lint   ruff, formatter, mypy            make venv   only the set-up
# All set-up happens by itself, in .venv; it needs Python 3.11 or newer and git.

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.stamp
PYTEST := -q -n 2 --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 8
RECENT := import pip, sys; sys.exit(sys.version_info < (3, 11))

.PHONY: demo test test-fast rehearse lint venv clean

demo: export OMP_NUM_THREADS ?= 1
demo: export CUDA_VISIBLE_DEVICES :=
demo: $(READY)
	@$(BIN)/python -m fastgrpo.cli check launch/t2v_tiny.toml $(ARGS) >/dev/null
	$(BIN)/python -m fastgrpo.cli.launch --standalone --local-addr 127.0.0.1 --nproc-per-node 2 launch/t2v_tiny.sh $(ARGS)
	@echo "The report of this run is report.html in its folder, runs/t2v_tiny unless ARGS named another (run.dir)."

test: $(READY)
	$(BIN)/pytest $(PYTEST)

test-fast: $(READY)
	$(BIN)/pytest $(PYTEST) --ignore=tests/system -m "not slow"

rehearse: $(READY)
	$(BIN)/python -m tests.rehearsal $(JOBS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(READY)

# torch first and alone: a CPU build at hand satisfies torch==2.13.0, and no gigabytes of CUDA follow.
$(READY): requirements.lock setup.py
	@if ! $(BIN)/python -c "$(RECENT)" 2>/dev/null; then \
	  found=; for python in $(PYTHON) python3.11 python3 python3.12 python3.13 python; do \
	    $$python -c "$(RECENT)" 2>/dev/null && found=$$python && break; \
	  done; \
	  [ -n "$$found" ] || { echo "PATH: no Python 3.11 or newer with pip; install one or add PYTHON=/its/path" >&2; exit 2; }; \
	  $$found -m venv --clear $(VENV) || { rm -rf $(VENV); exit 2; }; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
