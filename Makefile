# `make demo` and `make test` do all the set-up themselves; it needs Python 3.11 or newer and a package index.
PYTHON   ?= auto#  interpreter for .venv; auto: the first on PATH that fits
PARTS     = auto#  cpu or cuda; auto: cuda where nvidia-smi lists a GPU
PIP_ARGS ?=#       options for pip, such as the index of CPU wheels
WORKERS   = 3#     processes that share the tests, each with one thread of torch's; one waits at times
ARGS      =#       options for the command behind demo, test or bench

BIN   := .venv/bin
# Bytecode is kept, whatever the machine says: the tests start many processes, each of which would compile all sources.
TESTED = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-changed peers lint format docs bench gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON, PARTS=cpu|cuda, PIP_ARGS, WORKERS, ARGS; for example: make test ARGS='-k contract'"

setup: $(READY) ## make .venv and install everything into it (nothing to do: under a second)

$(READY): pyproject.toml packaging/fbgemm-gpu-cpu/pyproject.toml packaging/setup.sh
	@sh packaging/setup.sh $(PYTHON) $(PARTS) $(PIP_ARGS)

demo: $(READY) ## train sparse and dense models on real images, compare them, show where the pictures lie
	$(BIN)/python -m apps.demo $(ARGS)

test: $(READY) ## run the tests, without those marked slow, pages or gpu
	$(TESTED) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 5 $(ARGS)

test-changed: $(READY) ## run the tests that the working tree's changes concern (ARGS="--since main": all since then)
	@tests=$$($(BIN)/python tests/changed.py $(ARGS)) && if [ -z "$$tests" ]; then echo "no test is concerned"; else \
	$(TESTED) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $$tests; fi

peers: $(READY) ## install transformers and other peers, and run the tests of equality with them
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check $(PIP_ARGS) -e ".[peers]"
	$(TESTED) $(BIN)/python -m pytest -n $(WORKERS) tests/peers tests/examples $(ARGS)

lint: $(READY) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## build the site of docs/ into build/site, where a dead link is an error, and run the code of its how-to pages and README's commands
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check $(PIP_ARGS) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	$(TESTED) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "pages and not slow" tests/test_docs.py tests/test_readme.py

bench: $(READY) ## time the sparse layer against a dense one of equal active FLOPs
	$(BIN)/python benchmarks/layer.py $(ARGS)

gpu: $(READY) ## run all that needs a GPU, and write docs/runs/gpu.json and gpu.md to commit
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

clean: ## remove .venv, caches and build files; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache
	rm -rf packaging/*/build
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
