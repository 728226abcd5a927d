# make demo   simulate two plates of a lab that the bundles never saw, serve, adapt, classify (no torch)
# make test   lint, types and all tests
# Both make what they need on a machine with Python 3.11 or newer, python3-venv and make.

PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint types unit machine demo-bundle first-light real-images mitocheck open-set science science-check fetch-speed bench precision gpu-check train-profile reliability clean

demo: $(DEMO_VENV)/.ready
	$(DEMO_VENV)/bin/python -m examples.demo

test: $(VENV)/.ready machine check

check: lint types unit

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

# What trains, and the documentation's pages, use one core for most of their time: two of them run at once.
unit: $(VENV)/.ready
	$(BIN)/python -m pytest tests/training --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/test_docs.py --numprocesses 2
	$(BIN)/python -m pytest --ignore tests/training --ignore tests/test_docs.py

# Programs that some tests run: their own Redis, a trace of system calls, the documentation's curl, the proxy. Without them they skip.
machine:
	@missing=$$(for name in redis-server strace curl openssl haproxy; do command -v $$name >/dev/null || echo $$name; done); \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; } \
	  || echo "cannot be installed here, and what needs it will skip:" $$missing

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(DEMO_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[service,cpu,simulate]'
	touch $@

# The two committed bundles, from simulation alone.
demo-bundle: $(VENV)/.ready
	$(BIN)/python -m examples.demo_bundle

# Simulated, leave one lab out: build/first-light.json. Resumable.
first-light: $(VENV)/.ready
	$(BIN)/python -m benchmarks.first_light

# Simulated, methods by settings by seeds by cells: build/science.json and build/science/report. Long; resumable cell by cell.
science: $(VENV)/.ready
	$(BIN)/python -m benchmarks.science

# The kept figures of that, and the kept networks on plates simulated again: build/science-check.json.
science-check: $(VENV)/.ready
	$(BIN)/python -m benchmarks.science --check

# Real images, where ../shared/data is present: build/real-images.json.
real-images: $(VENV)/.ready
	$(BIN)/python -m benchmarks.real_images

# Real nuclei of many plates without controls, where ../shared/data is present: build/mitocheck.json. Resumable.
mitocheck: $(VENV)/.ready
	$(BIN)/python -m benchmarks.mitocheck

# Inactive wells and a phenotype never taught: build/open-set.json.
open-set: $(VENV)/.ready
	$(BIN)/python -m benchmarks.open_set

# How fast planes are fetched from disk: build/fetch-speed.json.
fetch-speed: $(VENV)/.ready
	$(BIN)/python -m benchmarks.fetch_speed

# Speed beside peers, every claim a ratio of one run: build/bench.json. Long; on a machine that does nothing else.
bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.bench

# What bfloat16 and fp16 cost trained networks in accuracy and calibration: build/precision.json.
precision: $(VENV)/.ready
	$(BIN)/python -m benchmarks.precision

# On a machine with a GPU: the demo bundle's answers on CUDA against the CPU's.
gpu-check: $(VENV)/.ready
	$(BIN)/python -m benchmarks.gpu_check

# Where a training step's time goes: build/train-profile.json. On a machine that does nothing else.
train-profile: $(VENV)/.ready
	$(BIN)/python -m benchmarks.train_profile

# Kills, faults and load on a running service: build/reliability.json. Long; part by part.
reliability: $(VENV)/.ready
	$(BIN)/python -m benchmarks.reliability

clean:
	rm -rf build $(VENV) $(DEMO_VENV)
