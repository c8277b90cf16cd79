# `make train` and `make test` need nothing but Python, a C++ compiler and make: each makes .venv and installs into it.
# A second run reinstalls only when pyproject.toml, constraints.txt or the native sources have changed.
PYTHON ?= python3
VENV ?= .venv
DATA ?=
SECONDS ?= 60
ARGS ?=
DIST ?= dist
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -lt 8 ] && echo $$n || echo 8)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
# Tests with a target of their own: what they need or cost is not for every run.
PROCESSES := $(addprefix tests/test_,across_memory.py faults.py rank_tools.py pretrain.py pretrain_inputs.py pretrain_processes.py)
EMULATED := $(addprefix tests/test_cuda_,similarity.py vectors.py goodness.py alignment.py launches.py races.py)
SANITIZED := tests/test_sanitize.py
PACKAGE := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)

.PHONY: help train test test-triton test-ptx test-cuda test-processes test-long sanitize fuzz mutate bench reproduce report check-report kernels gpu-check docs wheel check-wheel lint format clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make train [DATA=digits|pneumoniamnist|FOLDER] [ARGS='--seed 1']   the three FFCL stages"
	@echo "make test  [ARGS='-k similarity']                                  the tests; the targets below have more"
	@echo "make test-triton [ARGS='-k pool']                                  the Triton kernels under its interpreter"
	@echo "make test-ptx [ARGS='--chip sm80']                                 the same on what is compiled for sm_90, on a model"
	@echo "make test-cuda | test-processes                                    CUDA kernels on an emulator | real processes, faults"
	@echo "make sanitize | mutate                                             native code under sanitizers | broken on purpose"
	@echo "make fuzz [SECONDS=60] | test-long                                 arguments of any kind | what takes minutes"
	@echo "make bench [ARGS='-k ntxent']                                      the measurements, benchmarks/results/"
	@echo "make reproduce                                                     the CPU measurements in 15 minutes, and the report"
	@echo "make report | check-report                                         tables and plots from stored measurements | stale ones"
	@echo "make kernels [ARGS='--chips sm90']                                 compile the Triton kernels for every chip"
	@echo "make gpu-check [ARGS=--dry-run]                                    GPU tests, memory checker, measurements"
	@echo "make docs                                                          the documentation site, into site/"
	@echo "make wheel | check-wheel                                           sdist, CPU and CUDA wheel | without a compiler"
	@echo "make lint | format                                                 ruff, clang-format, mypy | ruff and clang-format"
	@echo "make clean | distclean                                             build outputs | the environment as well"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS); FFCL_CUDA=0|1, FFCL_CUDA_ARCHS for the build"

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -c 'import shutil; free = shutil.disk_usage(".").free >> 30; \
	  free < 8 and print(f"warning: {free} GiB of disk are free here; the environment takes 6.2, tests and builds 1 more")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The package itself, editable, with what the trainer needs. The build tools are pinned too, hence no isolation.
$(VENV)/.train: $(VENV)/.made $(PACKAGE)
	@echo "installing into $(VENV): PyTorch and the rest, then compiling csrc/; silent, 3 to 15 minutes the first time"
	@$(PIP) setuptools pybind11 cmake ninja
	@$(PIP) --no-build-isolation -e '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/.train
	@$(PIP) --no-build-isolation -e '.[train,test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.train
	@$(PIP) --no-build-isolation -e '.[train,bench]'
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	@$(PIP) --no-build-isolation -e '.[train,test,fuzz]'
	@touch $@

$(VENV)/.docs: $(VENV)/.train
	@$(PIP) --no-build-isolation -e '.[train,docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@$(PIP) --no-build-isolation -e '.[train,dev]'
	@touch $@

train: $(VENV)/.train
	@$(VENV)/bin/ffcl train $(if $(DATA),--data '$(DATA)') $(ARGS)

# Two threads a worker, so that the threaded paths run; passive, because workers share the cores.
test: $(VENV)/.test
	@OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q -n $(JOBS) --dist worksteal \
		$(addprefix --ignore=,$(PROCESSES) $(EMULATED) $(SANITIZED)) $(ARGS) tests

# Every Triton kernel under the interpreter, which must be chosen before triton is imported.
test-triton: $(VENV)/.test
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS) tests/interpreter/*.py

# The same tests on what Triton compiles for sm_90 (or sm_80), run on tools/ptx's model of the machine.
test-ptx: $(VENV)/.test
	@env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal -p tools.ptx.plugin \
		$(ARGS) tests/interpreter/*.py

# Pretraining, torchrun and its restarts, memory of the losses by number of processes: minutes on a free machine.
test-processes: $(VENV)/.test
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q $(ARGS) $(PROCESSES)

# Every CUDA kernel, compiled for the CPU by tests/emulation/ (a minute, once) and run there: minutes.
test-cuda: $(VENV)/.test
	@$(PY) -m pytest -q -n $(JOBS) $(ARGS) $(EMULATED)

# csrc/'s CPU part under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: two minutes of a core.
sanitize: $(VENV)/.test
	@$(PY) -m pytest -q $(ARGS) $(SANITIZED)

# Raw arguments of the native module, then the public functions; SECONDS for each. Without atheris: ARGS=--random
fuzz: $(VENV)/.fuzz
	@$(PY) tests/fuzz/run.py --seconds $(SECONDS) $(ARGS)

# What is too long for every run: many draws of every property, ten thousand calls of every function, twenty kills of
# a training, whole learning curves, two minutes of fuzzing.
test-long: $(VENV)/.fuzz
	@FFCL_EXAMPLES=100 OMP_NUM_THREADS=2 $(PY) -m pytest -q $(ARGS) --junit-xml=build/long-draws.xml \
		tests/test_properties*.py tests/test_hard_numbers.py
	@FFCL_LONG=1 $(PY) -m pytest -q $(ARGS) --junit-xml=build/long-calls.xml tests/test_contracts.py -k ten_thousand
	@FFCL_KILLS=20 OMP_NUM_THREADS=2 $(PY) -m pytest -q $(ARGS) --junit-xml=build/long-kills.xml \
		tests/test_train_resume.py -k killed
	@$(PY) tests/convergence.py
	@$(PY) tests/fuzz/run.py --seconds $(SECONDS) --junit-xml build/long-fuzz.xml
	@$(PY) -m tools.long_results $(foreach run,draws calls kills fuzz,build/long-$(run).xml)

# Every mutant of tools/mutants/ that has not been run on these sources; results in docs/results/mutants.json.
mutate: $(VENV)/.test
	@$(PY) -m tools.mutate $(ARGS)

bench: $(VENV)/.bench
	@$(PY) -m pytest benchmarks $(ARGS)

# The CPU part of the report anew, in under 15 minutes: two seconds a workload, without the largest sizes.
reproduce: $(VENV)/.bench
	@FFCL_BENCH_DEVICE=cpu $(PY) -m pytest -q benchmarks --brief --seconds 2 $(ARGS)
	@$(PY) -m benchmarks.report

report: $(VENV)/.bench
	@$(PY) -m benchmarks.report $(ARGS)

# Tables, sentences and plots in the README and the documentation are those of the stored measurements and runs.
check-report: $(VENV)/.test
	@$(PY) -m benchmarks.report --check README.md
	@$(PY) -m benchmarks.ablation_report --check docs/ffcl.md README.md

# Every Triton kernel configuration for every chip, and the CUDA kernels of the build, without a GPU.
kernels: $(VENV)/.test
	@$(PY) -m tools.kernels $(ARGS)
	@$(PY) -m tools.cuda_kernels

# On a machine with a GPU; ARGS=--dry-run checks what needs none.
gpu-check: $(VENV)/.test
	@$(PY) -m tools.gpu_check $(ARGS)

# Nothing is fetched, and a warning is an error. The variable silences an advertisement.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)

# The wheels are built from the sdist, as an installer would: for the CPU alone and, where nvcc is found, with CUDA.
wheel: $(VENV)/.dev
	@FFCL_CUDA_ARCHS="$${FFCL_CUDA_ARCHS:-$(WHEEL_ARCHS)}" $(PY) -m tools.wheels --dist $(DIST)

# Its CUDA wheel is compiled for one architecture, to be quick, and lies where nobody takes it for one to hand out.
check-wheel: DIST = build/dist
check-wheel: WHEEL_ARCHS = 90a
check-wheel: wheel $(VENV)/.test
	@OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(PY) .ci/check_wheel.py --dist $(DIST) -n $(JOBS) $(ARGS)

lint: $(VENV)/.dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(VENV)/bin/clang-format --dry-run --Werror csrc/*
	@$(VENV)/bin/pre-commit validate-config
	@$(PY) -m mypy

format: $(VENV)/.dev
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i csrc/*

clean:
	rm -rf build dist site *.egg-info ffcl_fast/_native*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f $(VENV)/.train $(VENV)/.test $(VENV)/.fuzz $(VENV)/.bench $(VENV)/.docs $(VENV)/.dev
	find ffcl_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
