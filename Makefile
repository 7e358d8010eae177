# Needs Python 3.10 or newer, make, and a network for the first target that installs.
# All that is made here stays in this folder: `make clean` removes it.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DEMO_ARGUMENTS ?=
TEST_ARGUMENTS ?=
GPU_ARGUMENTS ?=
# For two cores: many tests wait for their ranks, or on purpose.
TEST_PROCESSES ?= 3
EXTRAS ?= test,test-triton,examples
UPGRADE ?=

BIN := $(VENV)/bin
# Most modules of these packages are never imported: each is compiled when it is, not all of them now. That has to be kept:
# to compile what importing Lightning takes is three times the work of importing it, for each process that a test starts.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --no-compile -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest install-newest test-newest gpu lint docs package clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    train a small GPT with ddp and with onebit_ddp, on 2 CPU processes (5 minutes)'
	@echo 'make test    run the tests, with the versions of constraints.txt, on 2 cores (10 minutes)'
	@echo 'make test-oldest, test-newest'
	@echo '             the same with the oldest and the newest torch and Lightning that are supported; several GB each'
	@echo 'make gpu     check and measure on a GPU, with the Python that is there: nothing is installed'
	@echo 'make lint    ruff and mypy'
	@echo 'make docs    build the documentation in build/site; warnings are errors'
	@echo 'make package build the source distribution and the wheel in dist, and try both'
	@echo 'make clean   remove the virtual environment, caches and the output of the demo'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  DEMO_ARGUMENTS=$(DEMO_ARGUMENTS)'
	@echo '           TEST_ARGUMENTS=$(TEST_ARGUMENTS)  TEST_PROCESSES=$(TEST_PROCESSES) (tests at a time)'
	@echo '           such as DEMO_ARGUMENTS="--steps 200 --output runs/short"; --help lists them'

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(DEMO_ARGUMENTS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=worksteal $(TEST_ARGUMENTS)

# In environments of their own, beside that of `make test`. The oldest torch for CUDA brings a Triton that was never tried.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=test,examples

# Nothing is pinned there: whatever pyproject.toml admits and the index has today, so pip has to look again.
NEWEST := VENV=.venv-newest CONSTRAINTS=constraints-newest.txt UPGRADE=--upgrade
install-newest:
	rm -f .venv-newest/.installed
	$(MAKE) .venv-newest/.installed $(NEWEST)

test-newest: install-newest
	$(MAKE) test $(NEWEST)

# No environment is made: machines with a GPU have a Python with torch for it, and often no network.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(GPU_ARGUMENTS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml

# Tried as by somebody who has neither this folder nor what is installed for it: the wheel in an environment of its own, where
# it trains; the source distribution by some of its own tests. What an index would show as description has no link that leads
# nowhere there (tests/unit/test_packaging.py).
TRIAL := build/package
SDIST_TESTS := tests/unit/test_layout.py tests/unit/test_docs.py tests/unit/test_packaging.py tests/distributed/test_allreduce.py
package: $(VENV)/.installed-dev
	rm -rf dist $(TRIAL)
	PIP_CONSTRAINT=$(CURDIR)/$(CONSTRAINTS) $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(TRIAL)/venv
	$(TRIAL)/venv/bin/python -m pip install --no-compile -c $(CONSTRAINTS) torch
	$(TRIAL)/venv/bin/python -m pip install --no-compile -c $(CONSTRAINTS) dist/*.whl
	cp examples/minimal.py $(TRIAL)
	cd $(TRIAL) && env -u PYTHONPATH venv/bin/python minimal.py 2>&1 | tee minimal.log
	grep -q 'In all [78][.].* times fewer bytes' $(TRIAL)/minimal.log
	cd $(TRIAL) && env -u PYTHONPATH venv/bin/python -c 'import lightning_onebit as ours; assert "site-packages" in ours.__file__'
	tar -xzf dist/*.tar.gz -C $(TRIAL)
	cd $(TRIAL)/lightning_onebit-* && PYTHONPATH=. $(abspath $(BIN))/python -m pytest -p no:cacheprovider $(SDIST_TESTS)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps are newer than what was installed from: a changed requirement installs again.
# torch comes first and by itself, so that its version is the tested one, whatever else asks for it.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(UPGRADE) torch
	$(PIP_INSTALL) $(UPGRADE) -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[docs]'
	touch $@
