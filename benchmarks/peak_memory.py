"""How much memory a model takes on its way to ONNX, as a multiple of its parameters.

    python -m benchmarks.peak_memory [MEGABYTES]

Builds a model with about MEGABYTES (default 400) of parameters, in convolutions with batch norms,
parallel 1x1 convolutions and linear layers, on inputs so small that activations hardly count. In a
child process, after a tiny model has gone the same way (imports and caches don't count), it prints
for one forward, for capture, for all passes with their proofs and for the export the highest
resident memory of that stage, and last the multiple: what the whole way needed, the model's own
parameters included and what one forward takes in passing taken off, over the parameters' bytes.
Linux only: it reads /proc/self/status.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from optfuse.capture import capture
from optfuse.export import export
from optfuse.optimize import optimize, select
from optfuse.stages import LoadedModel, Program

MEGABYTES = 400
GOAL = 4.0
BLOCKS = 6

Result = TypeVar("Result")


class Heavy(nn.Module):
    """Convolutions with batch norms, then two parallel convolutions, then two linear layers.

    Args:
        width: channels; its square is what the parameters grow with.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        blocks = []
        for _ in range(BLOCKS):
            blocks += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            blocks += [nn.ReLU()]
        self.trunk = nn.Sequential(*blocks)
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU())
        self.last = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, 10)."""
        x = self.trunk(x)
        x = torch.cat([branch(x) for branch in self.branches], 1)
        logits: torch.Tensor = self.last(self.head(x.mean((2, 3))))
        return logits


def build(megabytes: float) -> LoadedModel:
    """A model with about that many megabytes of parameters."""
    width = int((megabytes * 1e6 / 4 / (BLOCKS * 9 + 2 + 4)) ** 0.5)
    return LoadedModel("heavy", Heavy(width).eval(), (torch.randn(1, width, 4, 4),))


def megabytes_of(module: nn.Module) -> float:
    """What the parameters take, in megabytes."""
    return sum(each.numel() * each.element_size() for each in module.parameters()) / 1e6


def resident(field: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, the highest since the last reset; megabytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def highest(name: str, work: Callable[[], Result]) -> tuple[Result, float]:
    """Run and print the highest resident memory meanwhile."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    result = work()
    peak = resident("VmHWM")
    print(f"{name:<28}{peak:>10.0f} MB", flush=True)
    return result, peak


def to_onnx(model: LoadedModel, folder: Path) -> None:
    """The whole way once, without a look at memory."""
    export(optimize(capture(model), select("all")), folder / "warm.onnx")


def child(megabytes: float) -> None:
    """Measure in this process."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        to_onnx(build(0.1), folder)
        gc.collect()
        before = resident("VmRSS")
        model = build(megabytes)
        parameters = megabytes_of(model.module)
        built = resident("VmRSS")
        print(f"{'before the model':<28}{before:>10.0f} MB")
        print(f"{'parameters':<28}{parameters:>10.0f} MB")
        _, forward = highest("one forward", lambda: model.module(*model.example_args))
        program, captured = highest("capture", lambda: capture(model))
        faster: Program
        faster, optimized = highest("passes and proofs", lambda: optimize(program, select("all")))
        _, exported = highest("export", lambda: export(faster, folder / "model.onnx"))
    passing = forward - built
    multiple = (max(captured, optimized, exported) - before - passing) / parameters
    print(f"{'multiple of the parameters':<28}{multiple:>10.2f}   (goal: at most {GOAL})")


def main(megabytes: float) -> None:
    """Measure in a child process, whose memory nothing else has touched."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--child", str(megabytes)]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else MEGABYTES)
