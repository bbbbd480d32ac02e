# Each target does everything it needs from a fresh clone: environment, torch, build, run.
PYTHON ?= python3
VENV ?= .venv
CUDA ?= AUTO
JOBS ?= 2
BUILD := build/make
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Compiling is the package's own business; pip only starts it. build-dir keeps the objects for the next time.
INSTALL := CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet --no-build-isolation \
	--no-deps --force-reinstall --config-settings=build-dir=$(BUILD) --config-settings=cmake.define.DSV4_CUDA=$(CUDA)

.PHONY: demo test build-tests test-native test-python bench lint format wheel clean

demo: $(VENV)/.runtime
	$(INSTALL) .
	$(BIN)/python -m dsv4.cli demo

test: test-native test-python

# One build gives the installed package and the native programs.
build-tests: $(VENV)/.test
	$(INSTALL) --config-settings=cmake.define.DSV4_NATIVE=ON .

test-native: build-tests
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j $(JOBS)
	@awk '/^Command: /{sub(".*/", ""); sub("\"$$", ""); name = $$0} /cases passed/{print name ": " $$0}' \
		$(BUILD)/Testing/Temporary/LastTest.log

test-python: build-tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --expect-cases

bench: build-tests
	for program in $(BUILD)/benchmarks/native/bench_*; do [ ! -x $$program ] || $$program || exit 1; done
	$(BIN)/python -m dsv4.cli bench

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -- '*.h' '*.cpp' '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files -- '*.h' '*.cpp' '*.cu' | xargs $(BIN)/clang-format -i

wheel: $(VENV)/.runtime
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) wheel --no-build-isolation --no-deps --config-settings=build-dir=$(BUILD) -w dist .

clean:
	rm -rf build dist

$(VENV)/.runtime: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'pip>=22.1'  # the first with --config-settings
	$(PIP) install --quiet -c constraints.txt torch numpy safetensors tokenizers rich scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(PIP) install --quiet -c constraints.txt pytest pytest-xdist hypothesis transformers matplotlib nvidia-cuda-nvdisasm
	touch $@

$(VENV)/.lint: $(VENV)/.runtime
	$(PIP) install --quiet -c constraints.txt ruff mypy clang-format
	touch $@
