"""What optfuse adds to the time of an export, as a ratio to `torch.onnx.export` as it comes.

    python -m benchmarks.export_time [ROUNDS]

Takes GoogLeNet to ONNX in two ways: plain (`torch.onnx.export` of the module), and ours (capture,
all passes with their proofs, our export). Both run in every round, in an order that alternates,
after one round of each that is not counted. Prints the seconds of each round, the medians, and the
median of the rounds' own ratios, which a slow minute of the machine moves least. Processor time on
one thread, so that neither pays for waiting on a busy machine.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from models import googlenet
from optfuse.capture import capture
from optfuse.export import export
from optfuse.optimize import optimize, select
from optfuse.stages import LoadedModel

ROUNDS = 7
GOAL = 2.0


def plain(model: LoadedModel, folder: Path) -> None:
    """What a user would type without optfuse."""
    torch.onnx.export(
        model.module, model.example_args, folder / "plain.onnx", dynamo=True, verbose=False
    )


def ours(model: LoadedModel, folder: Path) -> None:
    """Capture, all passes, verification and export."""
    faster = optimize(capture(model), select("all"))
    assert [step.name for step in faster.trace if step.undone] == []
    export(faster, folder / "ours.onnx")


def seconds(way: Callable[[LoadedModel, Path], None], model: LoadedModel, folder: Path) -> float:
    """Processor time of one run."""
    started = time.process_time()
    way(model, folder)
    return time.process_time() - started


def main(rounds: int) -> None:
    """Print one line a round, and the medians."""
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    module = googlenet.build().eval()
    model = LoadedModel("googlenet", module, tuple(googlenet.example_inputs()))
    taken: dict[str, list[float]] = {"plain": [], "ours": []}
    print(f"{'round':>6}{'plain s':>10}{'ours s':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way in (plain, ours):
            way(model, folder)
        for number in range(1, rounds + 1):
            for way in (plain, ours) if number % 2 else (ours, plain):
                taken[way.__name__].append(seconds(way, model, folder))
            a, b = taken["plain"][-1], taken["ours"][-1]
            print(f"{number:>6}{a:>10.2f}{b:>10.2f}{b / a:>8.2f}", flush=True)
    ratio = median(b / a for a, b in zip(taken["plain"], taken["ours"], strict=True))
    a, b = median(taken["plain"]), median(taken["ours"])
    print(f"{'median':>6}{a:>10.2f}{b:>10.2f}{ratio:>8.2f}   (goal: at most {GOAL})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
