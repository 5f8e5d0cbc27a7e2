# `make demo` and `make test` do all of their set-up, in $(VENV), on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
LOWEST := $(VENV)-lowest
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-slow test-lowest lint docs docs-serve check-package clean

demo: $(READY)
	$(VENV)/bin/deepcluster demo

# Three processes keep two cores busy: many tests wait, for processes, a browser or a server.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -m slow

# With the lowest version of each dependency that pyproject.toml allows. numpy 2.0 runs on Python 3.11 and 3.12.
test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses 3 --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The documentation site, in site/: open site/index.html. The variable silences an advertisement of the theme.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs serve

# The wheel and the sdist, in dist/, and whether they install and run the demo in a fresh environment.
check-package: $(READY)
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist
	DIST=dist $(VENV)/bin/python -m pytest -m slow tests/test_packaging.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "deepcluster needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs dist build site
