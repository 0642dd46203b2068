# Two commands: `make demo` shows what optfuse does, `make test` proves that it does it.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test fuzz check format benchmark zoo clean

demo: $(VENV)/installed
	$(BIN)/optfuse optimize models/googlenet.py:build \
	    --engine torch --engine onnxruntime --engine tensorrt-rtx --target sm_89 \
	    --threads 1 --output out/googlenet

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# Random networks for as long as MINUTES says, from another SEED every time.
MINUTES ?= 10
SEED    ?= $(shell date +%s)
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.random_graphs --minutes $(MINUTES) --seed $(SEED)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/installed
	$(BIN)/python -m benchmarks.driver_scaling
	$(BIN)/python -m benchmarks.export_time
	$(BIN)/python -m benchmarks.peak_memory
	$(BIN)/python -m benchmarks.latency_agrees

# docs/zoo.md: every network of torchvision. Goes on where it was stopped; half an hour on two cores.
zoo: $(VENV)/installed
	$(BIN)/python -m benchmarks.zoo

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,rtx,openvino,dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
