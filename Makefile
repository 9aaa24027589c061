# Everything runs in .venv, which is made on first use and refreshed when what the build reads has changed. The package is
# installed in editable mode: a change of Python counts at once, a change of C++ rebuilds.
#   make test ARGS="-k margins"      more arguments for the command behind a target
#   make PYTHON=python3.12 test      another interpreter, for a new .venv
#   make TORCH="torch==2.9.1" test   another torch, for a new .venv
#   make LIMIT=1800 test             more seconds than make test may take, on a slow or busy machine
.DEFAULT_GOAL := help
.PHONY: docs help demo test test-fast test-all test-triton test-sanitized test-oldest test-newest lint format bench bench-check bench-record clean distclean

PYTHON ?= python3
ARGS ?=
LIMIT ?= 540
# Without a GPU a CPU build of torch is enough, and the newest torch may come with gigabytes of CUDA libraries. It brings no
# Triton, whose interpreter and compiler the tests use: the one that belongs to this torch.
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),torch,torch==2.13.0 triton==3.7.1)

run := .venv/bin/python -m
# Of pip's lines those that take time: large files, the build, the end.
progress := /Downloading .* MB\)|Using cached .* MB\)|Building editable|Installing collected|Successfully installed/ \
  { sub(/^ +/, ""); print "    " substr($$0, 1, 100); fflush() }
csrc := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## Train on images with the fused and the reference head, compare and verify
	$(run) fused_arcface demo $(ARGS)

# Two processes; what takes gigabytes, alone, is in test-all.
test: .venv/.installed  ## Run the tests, without the full grids: at most 9 minutes
	.venv/bin/python tests/run.py --limit $(LIMIT) -m "not full" $(ARGS)

test-fast: .venv/.installed  ## Run the quick tests, for the daily loop
	$(run) pytest -q -n 2 --dist worksteal --durations=5 $(ARGS) tests \
	  -m "not (full or slow or distributed or emulation or interpreter or serial)"

# Without an index, or where Triton has no build, the suite has run all the same.
test-all: .venv/.installed  ## Run all the tests, and those of the Triton backend with another Triton
	.venv/bin/python tests/run.py $(ARGS)
	@$(MAKE) --no-print-directory .venv/triton-$(TRITON)/.installed || \
	  { echo "==> SKIPPED: the tests with Triton $(TRITON). pip could not install it; the lines above say why."; exit 0; }; \
	  $(MAKE) --no-print-directory test-triton

# One between the oldest and the newest. `make test-oldest` and `make test-newest` run those.
TRITON ?= 3.6.0

test-triton: .venv/triton-$(TRITON)/.installed  ## Run the tests of the Triton backend with another Triton: TRITON=3.6.0
	$(call triton_tests,$(<D),.venv/bin/python)

# What needs no GPU: Triton's compiler, its launcher over a driver that runs nothing, and its interpreter. $(1) is a folder
# with a Triton, which stands before the installed one, and $(2) the Python.
define triton_tests
@echo "==> Triton $$(PYTHONPATH=$(CURDIR)/$(1) $(2) -c 'import triton; print(triton.__version__)') of $(1)"
PYTHONPATH=$(CURDIR)/$(1) $(2) tests/run.py -m "not full" $(ARGS) $(wildcard tests/backends/test_triton*.py)
endef

# The interpreter of Triton before 3.7 needs a NumPy before 2.4.
.venv/triton-%/.installed: | .venv/.installed
	@echo "==> Installing Triton $* into $(@D)"
	@$(run) pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$* "numpy<2.4"
	@touch $@

# A build of its own, which the tests of the compiled module take in place of the installed one. Python is not linked with
# the C++ library, whose exceptions ASan watches, so both are loaded first. torch keeps memory until the end, so leaks are
# not looked for.
sanitizers = $$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)
native_tests := $(addprefix tests/,backends/test_cpu.py backends/test_threads.py test_properties.py)

test-sanitized: .venv/.installed  ## Run the tests of the compiled CPU kernels under ASan and UBSan
	CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1' FUSED_ARCFACE_CUDA=OFF \
	  $(run) pip install --quiet --no-deps --upgrade --target build/sanitized/lib \
	  --config-settings=build-dir=build/sanitized/build --config-settings=install.strip=false .
	LD_PRELOAD="$(sanitizers)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  .venv/bin/python tests/sanitized.py build/sanitized/lib -m "not full" $(native_tests) $(ARGS)

# Versions that the range in pyproject.toml allows, each in an environment of its own. A package index has these versions of
# torch with CUDA libraries only: the environments take 7 and 6 GB of disk. `make clean` leaves them, `make distclean`
# removes them.
OLDEST := torch==2.8.0 triton==3.4.0 numpy==1.23.5 typer==0.29.0
NEWEST := --upgrade torch triton numpy

test-oldest: .venv-oldest/.installed  ## Run the tests with the oldest supported torch, Triton, numpy and typer (7 GB of disk)
	.venv-oldest/bin/python tests/run.py -m "not full" $(ARGS)

# A CUDA build of torch takes the Triton that belongs to it, a CPU build lets pip take the newest one: that one too runs the
# tests of the Triton backend.
test-newest: .venv-newest/.installed  ## Run the tests with the newest torch, Triton and numpy (6 GB of disk)
	.venv-newest/bin/python tests/run.py -m "not full" $(ARGS)
	$(call triton_tests,.venv-newest/triton,.venv-newest/bin/python)

.venv-oldest/.installed: versions = $(OLDEST)
.venv-newest/.installed: versions = $(NEWEST)
.venv-oldest/.installed .venv-newest/.installed: pyproject.toml CMakeLists.txt $(csrc)
	@echo "==> Installing fused_arcface with $(versions) into $(@D)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(versions) -e ".[test,demo,bench,train,eval,compare,faiss,integrations]"
	@if [ $(@D) = .venv-newest ]; then $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --upgrade --target .venv-newest/triton triton; fi
	@touch $@

bench: .venv/.installed  ## Run the benchmark: every CPU backend and peer at the shapes of the README
	$(run) fused_arcface bench --cases full $(ARGS)

bench-check: .venv/.installed  ## Compare the benchmark's ratios with bench/baseline.json
	.venv/bin/python bench/check.py $(ARGS)

bench-record: .venv/.installed  ## Measure this machine anew and put the figures into README.md and bench/ (ten minutes alone on it)
	$(run) fused_arcface bench --cases full --output bench/results/cpu --no-report $(ARGS)
	$(run) fused_arcface bench --ranks 1,2,4 --output bench/results/cpu --no-report
	.venv/bin/python bench/check.py --update
	.venv/bin/python bench/update_readme.py

docs: .venv/.installed  ## Build the documentation as a site: docs/_build/html/index.html
	@$(run) pip install --quiet --disable-pip-version-check "fused-arcface[docs]"
	$(run) sphinx -q -W --keep-going -b html docs docs/_build/html

lint: .venv/.linters  ## Check style and types
	$(run) ruff check
	$(run) ruff format --check
	.venv/bin/clang-format --dry-run -Werror $(csrc)
	$(run) mypy

format: .venv/.linters  ## Put the sources into the style that lint checks
	$(run) ruff check --fix
	$(run) ruff format
	.venv/bin/clang-format -i $(csrc)

clean:  ## Remove build outputs and caches
	rm -rf build dist docs/_build .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv and the demo's results as well
	rm -rf .venv .venv-oldest .venv-newest runs

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'fused_arcface needs Python 3.10 or later;' \
	  '$(PYTHON) is '"$$($(PYTHON) --version 2>&1)"'. Name another: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo "==> Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.created pyproject.toml CMakeLists.txt $(csrc)
	@echo "==> Building fused_arcface and installing it with its dependencies into .venv (the first time takes minutes)"
	@rm -f .venv/.failed
	@{ $(run) pip install --progress-bar off --disable-pip-version-check $(TORCH) \
	  -e ".[test,demo,bench,train,eval,compare,faiss,integrations,dev]" || touch .venv/.failed; } | awk '$(progress)'
	@test ! -e .venv/.failed
	@touch $@

# The package is there already, so this fetches what its extra names and nothing else.
.venv/.linters: .venv/.installed
	@echo "==> Installing the linters into .venv"
	@$(run) pip install --quiet --disable-pip-version-check "fused-arcface[dev]"
	@touch $@
