# The few verbs. `make demo` and `make test` need nothing but Python >= 3.11 and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes of one thread each use two cores better than one process of two on small tensors.
THREADS := OMP_NUM_THREADS=1

.PHONY: demo test lint bench build gpu wheel wheel-test clean

demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/lct-fast train --data digits --method local-critic --groups 4 --out runs/demo/local-critic
	$(BIN)/lct-fast train --data digits --method backprop --out runs/demo/backprop
	$(BIN)/lct-fast eval runs/demo/local-critic
	$(BIN)/lct-fast report runs/demo/local-critic runs/demo/backprop --out runs/demo/report.html

test: $(VENV)/installed-test
	@$(THREADS) $(BIN)/python -m pytest --shard 0/2 >$(VENV)/shard-0.txt 2>&1 & other=$$!; \
	$(THREADS) $(BIN)/python -m pytest --shard 1/2; mine=$$?; \
	wait $$other; theirs=$$?; cat $(VENV)/shard-0.txt; exit $$((mine | theirs))

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed-rivals
	$(BIN)/lct-fast bench --rivals --out benchmarks/results/ops_cpu.json
	$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-group-by=param:case
	$(BIN)/python -m benchmarks.pipeline --out benchmarks/results/pipeline.json

# Tables and plots of README and docs, from benchmarks/results.
.PHONY: tables
tables: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.tables

# Recompiles the native module in place after a change under csrc/.
build: $(VENV)/installed
	$(BIN)/pip install -q --no-deps -e .

# On a CUDA machine without network, in the Python that holds its torch. ARGS="--fake --out DIR" tries it on a CPU.
gpu:
	$(PYTHON) -m benchmarks.gpu --out benchmarks/results/gpu $(ARGS)

# dist/cpu and, where nvcc is on the PATH, dist/cuda: one wheel each, for this Python and any supported torch.
wheel: $(VENV)/installed-test
	$(BIN)/python .ci/wheels.py build

# Each into fresh environments with two versions of torch; the package's tests from an empty folder.
wheel-test: wheel
	$(BIN)/python .ci/wheels.py test dist/*/*.whl

clean:
	rm -rf build dist *.egg-info lct_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip

$(VENV)/installed: $(VENV)/bin/python pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q -e '.[test]'
	touch $@

$(VENV)/installed-rivals: $(VENV)/installed-test
	$(BIN)/pip install -q -e '.[rivals]'
	touch $@
