# What a developer types. Every target first builds .venv from the pinned versions; nothing else is needed than make and Python.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?= -n auto

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished
QUANTIZED := $(VENV)/.quantized

PEFT_CACHE := .cache/peft-tests
PEFT_UNPACKED := $(PEFT_CACHE)/.unpacked
BASELINE_RUN := runs/baseline
BASELINE_RECORD := src/rankbits/recipes/library/quickstart.lora.json

SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

.DEFAULT_GOAL := help
.PHONY: help install quickstart baseline test lint types contracts conformance format clean
.DELETE_ON_ERROR:

help:  ## Show these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## Build .venv with everything the other targets need

quickstart: $(INSTALLED)  ## Fine-tune the embedded model on the embedded task; ARGS="key=value ..." changes the recipe
	HF_HUB_OFFLINE=1 $(BIN)/rankbits quickstart $(ARGS)

baseline: $(INSTALLED)  ## Train plain LoRA on the quickstart's work and store the record shown beside ours
	rm -rf $(BASELINE_RUN)
	HF_HUB_OFFLINE=1 $(BIN)/rankbits quickstart --baseline output=$(BASELINE_RUN) $(ARGS)
	cp $(BASELINE_RUN)/record.json $(BASELINE_RECORD)

test: $(INSTALLED)  ## Run the tests; PYTEST_ARGS="-k name" chooses some
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m "not slow and not gpu and not conformance" $(PYTEST_ARGS)

lint: $(INSTALLED)  ## Check style and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## Check the types
	$(BIN)/mypy

contracts: $(INSTALLED)  ## Check which room imports which
	$(BIN)/lint-imports --no-cache --no-logo

conformance: $(QUANTIZED) $(PEFT_UNPACKED)  ## Run PEFT's own tests over our tuners
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/conformance $(PYTEST_ARGS)

format: $(INSTALLED)  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv, caches and build results; runs/ stays
	rm -rf $(VENV) .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# An installation that was interrupted leaves $(UNFINISHED) behind and starts afresh next time.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard requirements/*.txt)
	@set -e; \
	rm -f $(INSTALLED); \
	if [ -e $(UNFINISHED) ] || ! { $(BIN)/python -c '$(SUITABLE)' && $(BIN)/python -m pip --version; } >/dev/null 2>&1; then \
		found=; \
		for candidate in "$(PYTHON)" python3.13 python3.12 python3.11; do \
			if "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "make: Python 3.11, 3.12 or 3.13 with its venv module is needed; tried $(PYTHON), python3.13, python3.12, python3.11." >&2; \
			echo "make: install one (on Debian and Ubuntu with its python3-venv package), or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
			exit 1; \
		fi; \
		echo "Building $(VENV) with $$("$$found" --version). The first time takes some minutes."; \
		"$$found" -m venv --clear $(VENV); \
	fi; \
	touch $(UNFINISHED); \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,report,quickstart,gguf,diffusion]'; \
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements/embedded.txt; \
	rm -f $(UNFINISHED); \
	touch $(INSTALLED)

# Building PEFT's metadata uses the setuptools that torch brings, so nothing but the archive itself is fetched.
$(PEFT_UNPACKED): requirements/peft-sdist.txt $(INSTALLED)
	rm -rf $(PEFT_CACHE)
	mkdir -p $(PEFT_CACHE)
	$(BIN)/python -m pip download --disable-pip-version-check --no-deps --no-build-isolation --no-binary peft \
		--require-hashes -r $< -d $(PEFT_CACHE)
	tar --no-same-owner -xzf $(PEFT_CACHE)/peft-*.tar.gz -C $(PEFT_CACHE)
	touch $@

# Only PEFT's tests of quantized base layers need these packages, which print as soon as they are imported.
$(QUANTIZED): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[quantized]'
	touch $(QUANTIZED)
