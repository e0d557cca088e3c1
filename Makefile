# Everything on a fresh machine with Python 3.11 or newer: `make demo` or `make test`.
# The first that runs and is new enough: a version manager's shim may be there for a version that is not chosen.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# A browser is opened where there is a screen.
OPEN := $(if $(or $(DISPLAY),$(WAYLAND_DISPLAY),$(filter Darwin,$(shell uname))),--open,--no-browser)

.PHONY: demo test contract weights lint types layers format clean help

help:
	@echo "make demo   set up, then make one clip exactly and fast and write a report"
	@echo "make test   set up, then run all tests"
	@echo "make contract   every technique and every pair through the whole contract"
	@echo "make lint types layers   the other checks"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Vivace needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# It asks for torchvision, which it does not need here and which breaks beside a CPU torch.
	$(BIN)/python -m pip install --quiet --no-deps cvvdp==0.5.7
	touch $(STAMP)

# Weights that some metrics rest on: fetched once, checked by hash. Without them those metrics say that they are skipped.
weights: $(STAMP)
	-$(BIN)/python -m vivace.evaluation.weights

demo: $(STAMP)
	$(BIN)/vivace compare "a large red sphere slides left on a checkered floor" --plan fast --seed 7 -o demo-output $(OPEN)

test: $(STAMP) weights
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not gpu and not slow"

# Every technique through every check, every pair, and the slow tests: longer than `make test`, which takes a part of it.
contract: $(STAMP)
	VIVACE_CONTRACT=full OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not gpu and (slow or contract)"

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: $(STAMP)
	$(BIN)/pyright

layers: $(STAMP)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) demo-output .pytest_cache .ruff_cache
