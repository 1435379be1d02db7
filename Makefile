# Every command builds what it needs in .venv, from Python 3.10 or newer and nothing else.
#
#   make demo         train a teacher and two students on generated clouds: table and plot
#   make test         all tests, with coverage
#   make lint         the linter and the formatter, changing nothing   (make format changes)
#   make types        the type checker, strict
#   make wheel        build the package, install it in an empty environment, import it from there
#   make hosts        the hosts and the notebooks, in .venv-hosts with their frameworks: all tests of them
#                     (make hosts-short: each for one epoch)
#   make examples     the demo and the hosts
#   make docs         the documentation, into docs/_build/html
#   make site         the documentation, looked at with a browser (needs Chromium or Chrome)
#   make links        whether the addresses in the documentation answer
#   make fuzz         random cases of everything public for MINUTES=30, on one core
#   make benchmarks   the operations against their peers, and a training step, on this machine's CPU
#   make clean        remove what was built (make distclean: .venv too)
#
# PYTHON=python3.12 chooses the interpreter, WORKERS=8 the number of test processes. Machines
# without an NVIDIA GPU save a large download with
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

PYTHON ?= python3
WORKERS ?= 2
MINUTES ?= 30
VENV := .venv
BIN := $(VENV)/bin

# Byte-compiling all of torch takes longer than compiling on import what is really used.
PIP_INSTALL = -m pip --disable-pip-version-check install --no-compile --constraint constraints.txt

# One thread per test process: the processes share the cores, and results do not depend on how many.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz lint format types wheel hosts hosts-short examples docs links site benchmarks clean distclean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.with-examples
	$(BIN)/python examples/distill

test: $(VENV)/.with-dev
	$(TEST_ENV) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --cov --durations 10

fuzz: $(VENV)/.with-dev
	$(TEST_ENV) $(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.with-dev
	$(BIN)/mypy

wheel: $(VENV)/.with-dev
	rm -rf build/wheel dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python $(PIP_INSTALL) dist/*.whl
	cd / && $(CURDIR)/build/wheel/bin/python -I $(CURDIR)/.ci/check_wheel.py
	rm -rf build/wheel

docs: $(VENV)/.with-docs
	$(TEST_ENV) $(BIN)/python -m sphinx -b html -W --keep-going -n -j 2 docs docs/_build/html

links: $(VENV)/.with-docs
	$(BIN)/python -m sphinx -b linkcheck -D plot_gallery=0 docs docs/_build/links

site: docs $(VENV)/.with-site
	$(BIN)/python -m pytest -m browser -p no:xdist tests/test_site.py

benchmarks: $(VENV)/.with-benchmarks
	$(BIN)/python benchmarks/pairwise.py --device cpu
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/latency.py

# The frameworks have an environment of their own, so that theirs never is that of the tests. A
# torchvision built for CUDA does not import beside a torch built for CPU, because nobody declared
# its operators; Lightning and torchdistill want its Python alone.
HOSTS := .venv-hosts
EXTENSION = $$($(HOSTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/extension.py

$(HOSTS)/.done: pyproject.toml constraints.txt examples/hosts/requirements.txt
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python $(PIP_INSTALL) --editable '.[dev]' --requirement examples/hosts/requirements.txt
	$(HOSTS)/bin/python -c 'import torchvision' || printf '%s\n' 'for _name in ("nms", "qnms"):' \
	  '    torch.library.define(f"torchvision::{_name}", "(Tensor a, Tensor b, float c) -> Tensor")' \
	  >> $(EXTENSION)
	$(HOSTS)/bin/python -c 'import torchvision'
	@touch $@

HOST_TESTS := tests/test_hosts.py tests/test_notebooks.py tests/test_baselines.py

hosts: $(HOSTS)/.done
	$(TEST_ENV) $(HOSTS)/bin/python -m pytest --numprocesses $(WORKERS) -m 'hosts or not hosts' $(HOST_TESTS)

hosts-short: $(HOSTS)/.done
	$(TEST_ENV) $(HOSTS)/bin/python -m pytest --numprocesses $(WORKERS) -m 'hosts and not long' $(HOST_TESTS)

examples: demo hosts

clean:
	rm -rf build dist docs/_build docs/_gallery docs/_notebooks .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache

distclean: clean
	rm -rf $(VENV) $(HOSTS)

# What was installed is stamped, so that only the first call, or a change of the requirements, pays.
EXTRAS_examples := examples
EXTRAS_dev := dev,examples,scans
EXTRAS_docs := docs
EXTRAS_site := dev,docs,site
EXTRAS_benchmarks := benchmarks,examples

$(VENV)/.with-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) --editable '.[$(EXTRAS_$*)]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fad_loss needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu, install the package python3-venv." >&2; exit 1; }

# Kernels:
#
#   make kernels-report  compile the kernels for sm_80 to sm_120 without a GPU; write the JSON
#   make gpu          GPU tests, self-check, sanitizer, benchmarks, with PYTHON's torch, in calls of
#                     LIMIT=540 seconds that continue each other (REHEARSE=1: without a GPU)
.PHONY: kernels-report gpu

kernels-report: $(VENV)/.with-dev
	$(BIN)/python benchmarks/kernels_report.py

gpu:
	OUT='$(OUT)' LIMIT='$(or $(LIMIT),540)' REHEARSE='$(or $(REHEARSE),0)' .ci/gpu.sh '$(PYTHON)'
