# `make train` and `make test` need nothing but Python, a C++ compiler and make: each makes .venv and installs into it.
# A second run reinstalls only when pyproject.toml, constraints.txt or the native sources have changed.
PYTHON ?= python3
VENV ?= .venv
DATA ?=
ARGS ?=
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -lt 8 ] && echo $$n || echo 8)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
PACKAGE := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)

.PHONY: help train test test-triton test-cuda bench report kernels gpu-check lint format clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make train [DATA=digits|pneumoniamnist|FOLDER] [ARGS='--seed 1']   the three FFCL stages"
	@echo "make test  [ARGS='-k similarity']                                  every test"
	@echo "make bench [ARGS='-k ntxent']                                      the measurements, benchmarks/results/"
	@echo "make report                                                        tables and plots from stored measurements"
	@echo "make kernels [ARGS='--chips sm90']                                 compile the Triton kernels for every chip"
	@echo "make gpu-check [ARGS=--dry-run]                                    GPU tests, memory checker, measurements"
	@echo "make lint | format                                                 ruff and mypy | ruff and clang-format"
	@echo "make clean | distclean                                             build outputs | the environment as well"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS); FFCL_CUDA=0|1, FFCL_CUDA_ARCHS for the build"

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The package itself, editable, with what the trainer needs. The build tools are pinned too, hence no isolation.
$(VENV)/.train: $(VENV)/.made $(PACKAGE)
	@echo "installing into $(VENV) (a few minutes the first time: PyTorch is large)"
	@$(PIP) setuptools pybind11 cmake ninja
	@$(PIP) --no-build-isolation -e '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/.train
	@$(PIP) --no-build-isolation -e '.[train,test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.train
	@$(PIP) --no-build-isolation -e '.[train,bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@$(PIP) --no-build-isolation -e '.[train,dev]'
	@touch $@

train: $(VENV)/.train
	@$(VENV)/bin/ffcl train $(if $(DATA),--data '$(DATA)') $(ARGS)

# Two threads a worker, so that the threaded paths run; passive, because workers share the cores.
test: $(VENV)/.test
	@OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q -n $(JOBS) --dist worksteal \
		--ignore=tests/test_triton_similarity.py --ignore=tests/test_triton_goodness.py \
		--ignore=tests/test_cuda_similarity.py --ignore=tests/test_cuda_goodness.py $(ARGS) tests

# Every Triton kernel under the interpreter: minutes a file.
test-triton: $(VENV)/.test
	@$(PY) -m pytest -q -n $(JOBS) $(ARGS) tests/test_triton_similarity.py tests/test_triton_goodness.py

# Every CUDA kernel, compiled for the CPU by tests/emulation/ (a minute, once) and run there: minutes.
test-cuda: $(VENV)/.test
	@$(PY) -m pytest -q -n $(JOBS) $(ARGS) tests/test_cuda_similarity.py tests/test_cuda_goodness.py

bench: $(VENV)/.bench
	@$(PY) -m pytest benchmarks $(ARGS)

report: $(VENV)/.bench
	@$(PY) -m benchmarks.report $(ARGS)

# Every Triton kernel configuration for every chip, and the CUDA kernels of the build, without a GPU.
kernels: $(VENV)/.test
	@$(PY) -m tools.kernels $(ARGS)
	@$(PY) -m tools.cuda_kernels

# On a machine with a GPU; ARGS=--dry-run checks what needs none.
gpu-check: $(VENV)/.test
	@$(PY) -m tools.gpu_check $(ARGS)

lint: $(VENV)/.dev
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: $(VENV)/.dev
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i csrc/*

clean:
	rm -rf build dist *.egg-info ffcl_fast/_native*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f $(VENV)/.train $(VENV)/.test $(VENV)/.bench $(VENV)/.dev
	find ffcl_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
