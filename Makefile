# make quickstart   fine-tune a small real Llama on this machine, no GPU needed (minutes)
# make test         the test suite
# make test-fast    the part of it that takes a minute or two
# make lint         ruff, mypy, import-linter and hadolint
# make docs         the documentation as HTML, in docs/_build/html
#
# PYTHON chooses the interpreter that makes the virtual environment: make test PYTHON=python3.12
# ARGS goes to `qvera quickstart`:                                  make quickstart ARGS="--fetch-only"

PYTHON ?= python3
VENV   ?= .venv
LOWEST ?= .venv-lowest
ARGS   ?=
BIN     = $(VENV)/bin

.PHONY: help quickstart test test-fast test-slow test-ci-slow test-stress test-tinker test-lowest lint format docs clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart    install into $(VENV), then fine-tune SmolLM2-135M and show what it learnt"
	@echo "make test          the test suite, without the slow part"
	@echo "                   QVERA_TEST_DEVICE=cuda runs kernels, adapters, models, training and serving on the card"
	@echo "make test-fast     the part of the suite that starts no processes and trains no whole runs"
	@echo "make test-slow     all slow tests: matrices of ZeRO stages and ranks, ssh, Slurm, NVMe, lm-eval (about an hour)"
	@echo "make test-ci-slow  the slow tests that .ci/run runs: those that guard files and gradients"
	@echo "make test-stress   a training killed a hundred times, and faults under load against real servers (half an hour)"
	@echo "make test-tinker   recipes of Tinker's cookbook against a server (an hour)"
	@echo "make test-lowest   the test suite with the oldest versions that pyproject.toml allows"
	@echo "make lint          ruff check, ruff format --check, mypy, import-linter, hadolint"
	@echo "make format        let ruff mend what it can"
	@echo "make docs          the documentation, as HTML in docs/_build/html; warnings are errors"
	@echo "make clean         remove virtual environments, caches and builds (runs/ stays)"

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/qvera quickstart $(ARGS)

# One worker a core; each computes on one thread. Modules go to the workers in the order of tests/conftest.py.
PARALLEL = -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test $(VENV)/.installed-trl
	$(BIN)/python -m pytest -q $(PARALLEL)

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q $(PARALLEL) -m 'not slow and not matrix and not process'

# pytest exits with 5 where it finds no test, which fails here too: a slow suite that vanished must not pass.
# Tests of ssh, Slurm and NVMe are skipped, with the Debian packages to install, where those are missing.
test-slow: $(VENV)/.installed-test $(VENV)/.installed-harness $(VENV)/.installed-trl
	$(BIN)/python -m pytest -q -m 'slow or matrix'
	$(BIN)/python -m pytest -q tests/evaluation/test_lm_eval.py tests/test_examples.py tests/adapters/test_peft_compat.py

test-ci-slow: $(VENV)/.installed-test $(VENV)/.installed-trl
	$(BIN)/python -m pytest -q $(PARALLEL) -m slow

test-stress: $(VENV)/.installed-test
	$(BIN)/python -m tests.stress.chaos
	$(BIN)/python -m tests.stress.serve_faults
	$(BIN)/python -m tests.stress.tinker_soak --tenants 100 --minutes 10 --kill-seconds 60

test-tinker: $(VENV)/.installed-test $(VENV)/.installed-tinker-cookbook
	$(BIN)/python -m pytest -q -m matrix tests/serve/tinker/test_cookbook.py

test-lowest: $(LOWEST)/.installed-test
	$(LOWEST)/bin/python -m pip list
	$(LOWEST)/bin/python -m pytest -q

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy qvera tests bench
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs docs/_build/html

clean:
	rm -rf $(VENV) $(LOWEST) dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qvera tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file is newer than pyproject.toml once its extras are installed, so nothing is installed twice.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "qvera needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	touch $@

# For people at a terminal, so with pip's progress: torch alone takes minutes.
$(VENV)/.installed-quickstart: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[quickstart]'
	touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

# The cookbook asks for a tml-renderers that is not on PyPI, and runs with the newest one there. So it comes by itself.
$(VENV)/.installed-tinker-cookbook: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tinker-cookbook]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps tinker-cookbook==0.6.1
	touch $@

$(LOWEST)/.created:
	$(PYTHON) -m venv $(LOWEST)
	touch $@

$(LOWEST)/.installed-test: pyproject.toml tests/lowest.py $(LOWEST)/.created
	$(LOWEST)/bin/python tests/lowest.py pyproject.toml > $(LOWEST)/constraints.txt
	cat $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt --editable '.[test]'
	touch $@
