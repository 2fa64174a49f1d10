# Every target works from a fresh checkout: the environment is built from the hash-pinned locks first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := VIRTUAL_ENV=$(VENV) $(BIN)/uv

.PHONY: env demo test check bench stress lock clean

env: $(VENV)/.dev          ## everything: running, testing, measuring

demo: $(VENV)/.runtime     ## the whole pipeline on a synthetic devkit
	$(BIN)/python cli.py demo

test: $(VENV)/.dev         ## the suite, without what is marked slow
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(VENV)/.dev        ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

stress: $(VENV)/.dev       ## kills, faults, power cuts, corruption and learning: up to half an hour
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not gpu and not weights"

bench: $(VENV)/.dev        ## the tables of benchmarks/, side by side in one run
	$(BIN)/python benchmarks/read_store.py
	$(BIN)/python benchmarks/extract_teachers.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/evaluate_detections.py
	$(BIN)/python benchmarks/bootstrap_images.py
	$(BIN)/python benchmarks/parallel_runs.py

lock: $(BIN)/uv            ## resolve the locks anew from setup.cfg
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    setup.cfg -o requirements.lock
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --extra dev --extra onnx -c requirements.lock setup.cfg -o requirements-dev.lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# pip builds the environment and fetches uv; uv installs torch and torchvision of one build, where pip may mix two.
$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.runtime: $(BIN)/uv requirements.lock
	test -e $(VENV)/.dev || $(UV) pip sync --quiet requirements.lock
	touch $@

$(VENV)/.dev: $(BIN)/uv requirements-dev.lock
	$(UV) pip sync --quiet requirements-dev.lock
	touch $@
