# Two commands: `make demo` shows what optfuse does, `make test` proves that it does it.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test test-gpu gpu-proof fuzz check format bench benchmark zoo clean

demo: $(VENV)/installed
	$(BIN)/optfuse optimize models/googlenet.py:build \
	    --engine torch --engine onnxruntime --engine tensorrt-rtx --target sm_89 \
	    --threads 1 --output out/googlenet

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# On a machine with an NVIDIA GPU, with what is installed there: nothing is downloaded.
HERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu:
	$(HERE) -m pytest -m gpu -rs

# docs/gpu.md: every network, before the passes and after them, on every engine; 8 minutes at most.
gpu-proof:
	$(HERE) -m benchmarks.gpu

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

# docs/benchmarks.md: optfuse beside its peers. Goes on where it was stopped; an hour and a half in
# all, and the machine should have nothing else to do.
bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.peers

# docs/zoo.md: every network of torchvision. Goes on where it was stopped; half an hour on two cores.
zoo: $(VENV)/installed
	$(BIN)/python -m benchmarks.zoo

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,rtx,openvino,dev]'
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
