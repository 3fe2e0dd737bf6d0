# Every target sets up what it needs (a virtual environment in .venv) and takes Hydra overrides in ARGS:
#   make train-stage1 ARGS="data=image_folder data.root=/my/images tokenizer.codebook_size=512"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
HYDRA_NEXT ?= hydra-core==1.4.0rc3
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-hydra lint typecheck docs docs-links size bench soak train-stage1 extract-codes train-stage2 sample eval-fid eval-rfid tensorboard

help: ## Show this list
	@echo "make TARGET [ARGS=\"hydra.overrides ...\"]"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: graincode needs Python 3.11 or newer: type make PYTHON=/path/to/python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -e ".[dev]"
	@touch $@

setup: $(READY) ## Make the environment (all other targets do so by themselves)

demo: $(READY) ## From images to metrics: all five jobs on Fashion-MNIST and a page to look at
	@$(BIN)/python experiments/data/fashion_mnist.py
	@$(BIN)/python experiments/demo/demo.py $(ARGS)

test: $(READY) ## Run the tests, two files at a time (ARGS are pytest's)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(READY) ## Run the tests that take less than 2 seconds each: before every commit
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

$(READY)-hydra: $(READY)
	$(BIN)/pip install --quiet $(PIP_ARGS) --upgrade --target $(VENV)/hydra-next $(HYDRA_NEXT)
	@touch $@

test-hydra: $(READY)-hydra ## Run the tests of configurations with the next version of Hydra, too
	@PYTHONPATH=$(VENV)/hydra-next OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -W error::UserWarning \
		--numprocesses 2 --dist loadfile $(addprefix tests/config/test_,job.py explained.py sweep.py) $(ARGS)

lint: $(READY) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

typecheck: $(READY) ## Check the types of core, sampling, api and export
	@$(BIN)/mypy

$(READY)-docs: $(READY)
	$(BIN)/pip install --quiet $(PIP_ARGS) -e ".[docs]"
	@touch $@

docs: $(READY)-docs ## Build the site in docs/_build/html and check its links
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)
	@echo docs/_build/html/index.html

docs-links: $(READY)-docs ## Check the links to other sites, too (needs the network)
	@$(BIN)/python -m sphinx --keep-going -q -b linkcheck docs docs/_build/links $(ARGS)

size: $(READY) ## Count lines and time --help (ARGS="--rev REV ." compares; --tests times the tests)
	@$(BIN)/python tools/size.py $(ARGS)

bench: $(READY) ## Time what matters against what it is compared with (ARGS="-k NAME" for some); writes runs/bench.json
	@$(BIN)/python experiments/bench/run.py $(ARGS)

soak: $(READY) ## Kill and damage trainings for 15 minutes, and compare what they end with (ARGS="--minutes 5", or "--writes 200")
	@$(BIN)/python experiments/soak/run.py $(ARGS)

train-stage1: $(READY) ## Train a tokenizer
	@$(BIN)/graincode-train-tokenizer $(ARGS)

extract-codes: $(READY) ## Encode a data set with the tokenizer that finished last
	@$(BIN)/graincode-extract-codes $(ARGS)

train-stage2: $(READY) ## Train a generator on the codes that were extracted last
	@$(BIN)/graincode-train-generator $(ARGS)

sample: $(READY) ## Draw images from the generator that finished last
	@$(BIN)/graincode-sample $(ARGS)

eval-fid: $(READY) ## Fréchet distance and IS of samples
	@$(BIN)/graincode-evaluate evaluation=generation $(ARGS)

eval-rfid: $(READY) ## Fréchet distance, PSNR and codebook use of reconstructions
	@$(BIN)/graincode-evaluate evaluation=reconstruction $(ARGS)

tensorboard: $(READY) ## Show the logs of all runs
	@$(BIN)/tensorboard --logdir runs $(ARGS)
