"""One network taken through everything: what came out, as JSON takes it.

Importing this imports every library that a network needs, so that processes can be forked from one
that has done so.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401 so that it is imported, as the next but one
import torch
import torch.onnx._internal.exporter._core

from benchmarks.zoo.figures import figures_of
from benchmarks.zoo.networks import Network, examples, networks
from optfuse import backends
from optfuse.capture import capture
from optfuse.compare import drift
from optfuse.errors import OptfuseError
from optfuse.export import export, export_baseline
from optfuse.float64 import run_float64, torch_threads
from optfuse.graph import flat_inputs
from optfuse.optimize import optimize, select
from optfuse.stages import Artifact, BuildOptions, Drift, LoadedModel

WRONG_TIMES = 10.0
"""How many times as far from the float64 reference as the export as it comes, for it to be wrong:
folding moves float32's rounding around, which changes its sum by a small factor either way."""
WRONG_FROM = 1e-4
"""And at least so far, relative L2: below lies float32's own rounding in a deep network, where
either export may be the luckier one by chance."""

Row = dict[str, Any]

NETWORKS = {each.name: each for each in networks()}
"""All networks by name."""


def row_of(network: Network) -> Row:
    """Everything the zoo tells of one network, as JSON takes it.

    Its `outcome` is `right`, `wrong` or `crashed`, and `why` says more. Pairs are before and after:
    `operators`, `kinds` and `batch_norms` of the programs, `onnx_operators` and `drift` (relative
    L2) of the exports. `passes` holds the places of each and the operators it took away, `refused`
    how often for each reason, `seconds` those of each stage and `cpu_seconds` the processor's.

    Raises:
        OptfuseError: a stage refused the network.
    """
    clock = _Clock()
    model = LoadedModel(network.name, network.build(), examples(network))
    clock.stop("build")
    captured = capture(model)
    clock.stop("capture")
    faster = optimize(captured, select("all"))
    clock.stop("optimize")
    reference = _tensors(run_float64(captured.graph_module, captured.example_args, {}))
    clock.stop("reference")
    figures = figures_of(captured, faster)
    feeds = _tensors(flat_inputs(captured.graph_module, captured.example_args, {}))
    with tempfile.TemporaryDirectory(prefix="optfuse-zoo-") as name:
        baseline = export_baseline(captured, Path(name) / "baseline.onnx")
        ours = export(
            faster,
            Path(name) / "model.onnx",
            input_names=baseline.input_names,
            output_names=baseline.output_names,
        )
        clock.stop("export")
        undone = [f"{step.name}: {step.undone}" for step in faster.trace if step.undone]
        del model, captured, faster  # the engine needs memory of its own
        gc.collect()
        drifts = [_drift(each, feeds, reference) for each in (baseline, ours)]
        clock.stop("run")
    wrong = "; ".join(undone) or why_wrong(*drifts)
    return {
        "outcome": "wrong" if wrong else "right",
        "why": wrong,
        **figures,
        "onnx_operators": [each.trace[-1].operators_after for each in (baseline, ours)],
        "drift": [float(f"{each.relative_l2:.3e}") for each in drifts],
        "seconds": clock.seconds,
        "cpu_seconds": round(time.process_time(), 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def why_wrong(baseline: Drift, ours: Drift) -> str | None:
    """Why the outputs of our file are not those of the program, or None where they are."""
    if ours.nonfinite:
        return f"{ours.nonfinite} outputs are not finite"
    limit = max(WRONG_FROM, WRONG_TIMES * baseline.relative_l2)
    if ours.relative_l2 <= limit:
        return None
    return f"its outputs are {ours.relative_l2:.1e} from float64, and {limit:.1e} is the limit"


class _Clock:
    """The seconds of each stage, one decimal."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def stop(self, stage: str) -> None:
        """The stage ends now, and the next one begins."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._started, 1)
        self._started = now


def _drift(
    artifact: Artifact, feeds: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> Drift:
    """How far ONNX Runtime's outputs are from the program in float64."""
    backend = backends.get("onnxruntime")
    with backend.open(artifact, BuildOptions(threads=1)) as session:
        session.bind(feeds)
        session.run()
        return drift(
            session.fetch(),
            reference,
            engine=backend.name,
            variant=artifact.variant,
            reference_name="captured program in float64",
        )


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def into(folder: str, name: str) -> None:
    """Write the row of one network to `row.json` in a folder, and what is printed on the way to
    `log`; what runs in a process of its own."""
    log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with torch_threads(1):
        try:
            row = row_of(NETWORKS[name])
        except OptfuseError as error:
            row = {"outcome": "crashed", "why": str(error)}
    (Path(folder) / "row.json").write_text(json.dumps(row), encoding="utf-8")
