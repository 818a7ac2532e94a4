# make help lists the targets. Everything is installed into VENV, with PYTHON's version of Python.
PYTHON ?= python3
VENV ?= .venv

GPU := $(or $(wildcard /dev/nvidiactl),$(shell command -v nvidia-smi))
NVCC := $(or $(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc))
# What pip installs where VENV has no torch yet. Without a GPU a version with CPU builds, which an index may prefer.
TORCH ?= $(if $(GPU),torch>=2.10,torch==2.13.0)
# With a GPU and no nvcc, a whole CUDA toolkit from pip; its nvcc is found by setup.py.
ifneq ($(GPU),)
ifeq ($(NVCC)$(filter cpu,$(QUEST_OPS_DEVICE)),)
TOOLKIT := "nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*" "nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*" \
	"nvidia-cuda-runtime==13.0.*"
endif
endif

NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# cmake and ninja come from VENV.
export PATH := $(abspath $(VENV))/bin:$(PATH)
# One build folder for pip and `setup.py build_ext`, so that only what changed is compiled.
export DIST_EXTRA_CONFIG := $(abspath $(VENV))/distutils.cfg

.PHONY: help install demo test bench format lint clean
help:
	@echo 'make demo      dense and Quest attention side by side, on a GPU or a CPU (ARGS="--tokens 7000")'
	@echo 'make test      all tests that can run on this machine (ARGS="-k selection")'
	@echo 'make bench     decode attention timed on the CPU and, where there is one, the GPU'
	@echo 'make install   the package and the decoder into $(VENV), editable'
	@echo 'make format    ruff and clang-format'
	@echo 'make lint      the same, checking only'
	@echo 'make clean     removes builds and $(VENV)'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)"; the README has those of the build.'

install: $(VENV)/.installed-llama

demo: $(VENV)/.installed-llama
	$(VENV)/bin/quest-ops demo $(ARGS)

# Two at a time; one, for a debugger: ARGS="-n 0 --pdb".
test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/.installed-llama
	$(VENV)/bin/python benchmarks/cpu_decode.py
	$(if $(GPU),$(VENV)/bin/python benchmarks/kernels.py)

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf build dist $(VENV) *.egg-info quest_ops/*.so demo.png

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-tools: $(VENV)/bin/python
	$(PIP) install "setuptools>=77" wheel "cmake>=3.26" ninja "pybind11>=2.13" $(TOOLKIT)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	printf '[build_ext]\nbuild_temp = build/native\n' > $(DIST_EXTRA_CONFIG)
	touch $@

# One rule for each extra of pyproject.toml. A second one compiles nothing again.
$(VENV)/.installed-%: $(VENV)/.build-tools $(NATIVE)
	$(PIP) install --no-build-isolation -e ".[$*]"
	touch $@
