# `make demo` and `make test` set up everything they need; PYTHON is any Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint docs format clean

demo: $(VENV)/ready
	$(BIN)/python examples/semantic_segmentation.py --steps 220 --search_steps 60 --output_dir out/demo --overwrite

# Two processes with a thread each: the models are too small for more threads. Quantized bases in a second run: PEFT
# imports every backend that it finds, which takes seconds and says a lot.
test: $(VENV)/ready $(VENV)/quantized
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore tests/test_quantized.py
	PYTHONPATH=$(VENV)/quantized $(BIN)/python -m pytest tests/test_quantized.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir out/site

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its exact version: other requirements would bring a build with CUDA's libraries.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes)"
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/quantized: $(VENV)/ready
	$(PIP) install --constraint constraints.txt --no-deps --upgrade --target $@ bitsandbytes torchao
	touch $@

clean:
	rm -rf $(VENV) out build src/*.egg-info
