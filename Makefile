# `make demo` and `make test` work from a bare checkout with nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*)
# Small tensors: a second thread per process costs more than it brings, and many times more on busy cores.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# A process per core; a file's tests stay together, for the sake of the fixtures that they share. In the order of their
# names: by default files with few tests come last, among them some of the longest, and cores wait for each other.
PARALLEL := -n logical --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lowest lint types docs wheels teacher clean

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/rdm-sdk demo --output demo

test: $(VENV)/.quantization
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-all: $(VENV)/.quantization
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL)

# With the least versions that pyproject.toml asks for, in an environment of their own.
lowest:
	@mkdir -p build
	$(PYTHON) .ci/lowest.py > build/lowest.txt
	$(MAKE) --no-print-directory test VENV=build/lowest CONSTRAINTS=build/lowest.txt

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry .

types: $(VENV)/.installed
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/settings_page.py
	$(BIN)/python docs/recipes_page.py
	$(BIN)/python docs/logs_page.py
	$(BIN)/mkdocs build --strict

# Of the SDK and of every plugin, tried together in a fresh environment; `.ci/wheels.py --help` has more.
wheels: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python .ci/wheels.py --out dist

teacher: $(VENV)/.installed
	$(BIN)/python benchmarks/digits_teacher.py --out build/digits

# Torch first and by its exact version, so that a local or CPU build of it is taken where there is one.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(addsuffix /pyproject.toml,$(PLUGINS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || \
	  { echo "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the tested versions into $(VENV); this takes a few minutes."
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $(CONSTRAINTS))" -c $(CONSTRAINTS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps $(addprefix -e ,$(PLUGINS))
	@touch $@

# Adapters are trained on quantized layers in the tests. On its own, because bitsandbytes has something to say at every
# start of a program on some CPUs.
$(VENV)/.quantization: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[quantization]"
	@touch $@

clean:
	rm -rf $(VENV) demo build site .pytest_cache .mypy_cache .ruff_cache
