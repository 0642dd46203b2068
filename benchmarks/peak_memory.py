"""How much memory a model takes on its way through optfuse, as a multiple of its parameters.

    python -m benchmarks.peak_memory [MEGABYTES]

Builds a model with about MEGABYTES (default 400) of parameters, in convolutions with batch norms,
parallel 1x1 convolutions and linear layers, on inputs so small that activations hardly count. It is
measured in child processes, each after a tiny model has gone the same way: imports and caches don't
count.

The first one prints for one forward, for capture, for all passes with their proofs and for the
export the highest resident memory of that stage, and last the multiple: what the whole way needed,
the model's own parameters included and what one forward takes in passing taken off, over the
parameters' bytes. Each of the others does all that `optfuse optimize` does, from the source to the
report, with other engines, and prints the same multiple with nothing taken off.

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

from optfuse import pipeline
from optfuse.capture import capture
from optfuse.export import export
from optfuse.optimize import optimize, select
from optfuse.stages import LoadedModel, Program, Source

MEGABYTES = 400
GOAL = 4.0
BLOCKS = 6
TINY_MEGABYTES = 0.1
SECONDS = 1.0
"""For latency: the memory it takes does not grow with the time."""
ENGINES = ("torch", "onnxruntime", "torch,onnxruntime")

SOURCE = """
import torch
from benchmarks.peak_memory import Heavy

def build():
    return Heavy({width})

def example_inputs():
    return (torch.randn(1, {width}, 4, 4),)
"""

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


def width_of(megabytes: float) -> int:
    """The width that gives a model about that many megabytes of parameters."""
    return int((megabytes * 1e6 / 4 / (BLOCKS * 9 + 2 + 4)) ** 0.5)


def build(megabytes: float) -> LoadedModel:
    """A model with about that many megabytes of parameters."""
    width = width_of(megabytes)
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


def stages(megabytes: float) -> None:
    """Measure stage by stage, in this process."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        to_onnx(build(TINY_MEGABYTES), folder)
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
    print_multiple(multiple)


def optimize_command(megabytes: float, engines: str, folder: Path) -> pipeline.Outcome:
    """What `optfuse optimize --threads 1` does with a model of that size."""
    source = folder / f"heavy_{megabytes:.0f}.py"
    source.write_text(SOURCE.format(width=width_of(megabytes)))
    request = pipeline.Request(
        Source(f"{source}:build"),
        output=folder / source.stem,
        engines=tuple(engines.split(",")),
        duration_seconds=SECONDS,
    )
    outcome = pipeline.run(request)
    assert not outcome.failures
    return outcome


def command(megabytes: float, engines: str) -> None:
    """Measure the whole command with these engines, in this process."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        optimize_command(TINY_MEGABYTES, engines, Path(name))
        gc.collect()
        before = resident("VmRSS")
        outcome, peak = highest(
            f"optimize {engines}", lambda: optimize_command(megabytes, engines, Path(name))
        )
    parameters = outcome.report.document["program"]["parameters_before"] * 4 / 1e6
    print_multiple((peak - before) / parameters)


def print_multiple(multiple: float) -> None:
    """Beside what it ought to be."""
    print(
        f"{'multiple of the parameters':<28}{multiple:>10.2f}   (goal: at most {GOAL})", flush=True
    )


def main(megabytes: float) -> None:
    """Measure in child processes, whose memory nothing else has touched."""
    for engines in ("", *ENGINES):
        arguments = ["--child", str(megabytes), *filter(None, [engines])]
        child = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
        subprocess.run(child, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        size = float(sys.argv[2])
        command(size, sys.argv[3]) if len(sys.argv) > 3 else stages(size)
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else MEGABYTES)
