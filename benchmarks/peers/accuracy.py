"""What each precision costs in accuracy: the trained network on images that nothing else saw."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.kept import ROOT
from benchmarks.peers.contenders import OTHERS, OURS
from optfuse import backends
from optfuse.capture import capture
from optfuse.compare import drift
from optfuse.export import export_baseline
from optfuse.float64 import run_float64, torch_threads
from optfuse.load import load
from optfuse.lower import lower
from optfuse.optimize import optimize, select
from optfuse.precision.plan import Plan, Precision
from optfuse.stages import BuildOptions, InputSpec, Source

ENGINES = ("onnxruntime", "openvino", "torch")


def rows() -> list[dict[str, Any]]:
    """One row for each precision on each engine that has it."""
    from models import digits

    with np.load(digits.HELD_OUT) as arrays:
        images = torch.from_numpy(arrays["input"])
    labels = torch.from_numpy(np.load(digits.LABELS)).long()
    # Every other one calibrates, and the rest judges: 448 of each, at once.
    calibration, shown, truth = images[::2], images[1::2], labels[1::2]
    source = Source(f"{ROOT}/models/digits.py:build", inputs=(InputSpec(None, tuple(shown.shape)),))
    found = []
    with torch_threads(1), tempfile.TemporaryDirectory(prefix="optfuse-") as folder:
        captured = capture(load(source))
        faster = optimize(captured, select("all"))
        baseline = export_baseline(captured, Path(folder) / "baseline.onnx")
        (reference,) = run_float64(captured.graph_module, (shown,), {})
        for contender in (*OTHERS, *OURS):
            backend = backends.get(contender.engine)
            if contender.engine not in ENGINES or contender.by in ("onnxsim", "onnxslim"):
                continue
            if backend.unavailable() or backend.refuses(contender.precision):
                continue
            thing: Any = captured if backend.consumes == "program" else baseline
            if contender.by == "optfuse":
                lowered = lower(
                    faster,
                    Plan(
                        cast(Precision, contender.precision),
                        calibration=[[calibration]],
                    ),
                    Path(folder) / contender.precision / "model.onnx",
                    engines=ENGINES,
                )
                thing = (
                    lowered.program
                    if backend.consumes == "program"
                    else lowered.file_for(contender.engine)
                )
            with backend.open(thing, BuildOptions(threads=1)) as session:
                session.bind([shown])
                session.run()
                outputs = session.fetch()
            away = drift(
                outputs,
                [reference],
                engine=contender.engine,
                variant=contender.name,
                reference_name="float64",
            )
            found.append(
                {
                    "by": contender.by,
                    "engine": contender.engine,
                    "precision": contender.precision,
                    "images": len(truth),
                    "correct": int((outputs[0].argmax(1) == truth).sum()),
                    "top1": away.top1_agreement,
                    "relative_l2": away.relative_l2,
                }
            )
    return found
