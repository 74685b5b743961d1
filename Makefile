# Everything a person types. Each target builds what it needs; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help install quickstart toys demo docs shipped test test-slow gpu-check check cards format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

install: $(VENV)/.user  ## the library, its command and its demo into .venv
	@echo 'Ready: . $(VENV)/bin/activate, then drifting-diffusers --help'

demo: $(VENV)/.user  ## the Space in your browser, with the model that comes along
	$(BIN)/drifting-diffusers demo

quickstart: $(VENV)/.user  ## train a one-step generator of Fashion-MNIST and look at it: outputs/quickstart/samples.png
	$(BIN)/python examples/quickstart.py

toys: $(VENV)/.user  ## two-dimensional pictures of the idea: outputs/particles, outputs/toy_2d
	$(BIN)/python examples/01_particles.py
	$(BIN)/python examples/02_toy_2d.py

test: $(VENV)/.dev  ## the test suite, without what takes minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

test-slow: $(VENV)/.dev  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses $(JOBS) --dist load

gpu-check: $(VENV)/.dev  ## every test and benchmark that needs a GPU, below ten minutes: fills docs/performance.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu_check.py --json docs/results/performance/gpu.json
	$(BIN)/python benchmarks/performance_page.py

check: $(VENV)/.dev  ## format, lint, import contracts, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: $(VENV)/.dev  ## the documentation into outputs/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir outputs/site

shipped: $(VENV)/.dev  ## train the model that comes along anew: an hour on one core
	$(BIN)/python examples/quickstart.py --max_steps 10000 --guidance --output_dir outputs/shipped
	$(BIN)/drifting-diffusers evaluate outputs/shipped/pipeline --dataset examples/data/fashion_mnist --held-out-split test \
		--extractor lite0 --judge --num-samples 2000 --guidance-scales 1 1.2 1.5 2 3 --output outputs/shipped/evaluation
	$(BIN)/python benchmarks/ship.py outputs/shipped outputs/shipped/evaluation src/drifting_diffusers/shipped_models/fashion-mnist

cards: $(VENV)/.user  ## render model_cards/ anew
	$(BIN)/python -c 'import pathlib; from drifting_diffusers.releases import RELEASES, release_card; \
		[pathlib.Path(f"model_cards/{name}.md").write_text(release_card(name)) for name in RELEASES]'

format: $(VENV)/.dev  ## rewrite the code as ruff would
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and what the examples wrote
	rm -rf $(VENV) outputs

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "drifting_diffusers needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, then the library: a few minutes, about 2 GB ..."
	$(PIP) torch
	@touch $@

$(VENV)/.user: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[plot,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.user
