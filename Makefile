# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
# pip compiles modules on one core, which takes longer than installing them; this takes all. Files that are no modules
# (templates) do not compile.
INSTALL := $(PIP) install --quiet --no-compile
COMPILE := .venv/bin/python -m compileall -qq -j 0 .venv/lib || true
STAMP := .venv/.installed

.PHONY: demo test check format bench clean

demo: $(STAMP)-run            ## set up, then run the main job on the packaged model and data
	.venv/bin/bitatlas demo

# Two files at a time; each process computes on one thread.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)-dev            ## set up, then run every test
	$(PYTEST)

check: $(STAMP)-dev           ## what a person runs before a commit: format, lint, types, fast tests
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTEST) -m "not slow"

format: $(STAMP)-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: $(STAMP)-dev           ## ratios against real peers, each in its own environment; results in outputs/benchmarks
	.venv/bin/python -m tests.benchmarks

clean:
	rm -rf .venv .venv-bench build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

$(STAMP)-run: pyproject.toml constraints.txt requirements-embedded.txt | .venv/bin/python
	$(INSTALL) --constraint constraints.txt --editable .
	$(INSTALL) --no-deps --requirement requirements-embedded.txt
	$(COMPILE)
	touch $@

$(STAMP)-dev: $(STAMP)-run
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(COMPILE)
	touch $@
