"""One run as the other tests of the report see it: a full document, an empty one, a hostile one."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from optfuse.report.schema import (
    Comparison,
    NoiseFloor,
    NotMeasured,
    ProgramCounts,
    assemble,
)
from optfuse.stages import (
    Artifact,
    Drift,
    EngineLayer,
    EngineReport,
    InputSpec,
    Measurement,
    Refused,
    Report,
    Site,
    Source,
    Step,
)
from optfuse.stats import Ratio

OUTPUT = Path("/home/someone/out")

HOSTILE_NAMES = (
    "a|b",
    "line\nbreak",
    "\x1b[31mred\x1b[0m",
    "[red]markup[/red]",
    "`code`",
    "<script>alert(1)</script>",
    "right\u202eto left",
    "lone \ud800 surrogate",
)

STEPS = (
    Step("capture", "torch.export", 1.27, 196, 196),
    Step(
        "pass",
        "fold_conv_bn",
        2.341,
        196,
        139,
        settings={"round": 1, "options": []},
        sites=tuple(Site(f"conv2d_{i}", f"folded batch_norm_{i}") for i in range(57)),
        refused=(
            Refused("conv2d_60", "the convolution's output has 2 users"),
            Refused("conv2d_61", "the batch norm is in training mode"),
            Refused("conv2d_62", "the convolution's output has 2 users"),
        ),
        relative_l2=1.24e-15,
    ),
    Step(
        "pass",
        "elide_concat",
        0.5,
        139,
        139,
        sites=(Site("cat_1"),),
        relative_l2=0.031,
        undone="in float64 its outputs moved by a relative L2 of 3.1e-02, and 1e-10 is the limit",
    ),
    Step("pass", "combine_parallel_convs", 0.25, 139, 120, sites=(Site("conv2d_7", "3 of them"),)),
    Step("pass", "eliminate_common_subexpressions", 12.5, 120, 120),
    # Run again because something had changed; it found nothing more.
    Step("pass", "fold_conv_bn", 0.0123, 120, 120),
)


def full_arguments() -> dict[str, Any]:
    """What `assemble` takes for a run with two engines that ran and one that could not."""
    return {
        "name": "googlenet",
        "source": Source("models/googlenet.py:build", weights=Path("w.safetensors"), seed=3),
        "command": ["optfuse", "optimize", "models/googlenet.py:build", "--output", "my folder"],
        "environment": {
            "cpu_model": "Some CPU @ 2.50 GHz",
            "memory_bytes": 8_350_000_000,
            "load_average": [0.25, 0.5, 0.75],
            "gpu": None,
            "versions": {"torch": "2.13.0", "tensorrt_rtx": "1.7.1", "tensorrt": None},
        },
        "settings": {"passes": ["fold_conv_bn"], "seed": 3, "threads": 2, "targets": ["sm_89"]},
        "inputs": [InputSpec("x", (1, 3, 224, 224))],
        "before": ProgramCounts(
            {"conv2d": 57, "batch_norm": 57, "relu": 57, "cat": 25}, 6_998_552, None
        ),
        "after": ProgramCounts({"conv_act": 57, "cat": 25, "conv2d": 38}, 6_990_001, 3_005_000_000),
        "steps": STEPS,
        "drifts": [
            _drift("onnxruntime", "baseline", 3.2e-7),
            _drift("onnxruntime", "optimized", 4.0e-7),
            _drift("torch", "optimized", 2.9e-7),
        ],
        "measurements": [
            _measurement("torch", "baseline", 31.5),
            _measurement("onnxruntime", "baseline", 12.125),
            _measurement("onnxruntime", "control", 12.25),
            _measurement("onnxruntime", "optimized", 12.0),
        ],
        "comparisons": [
            Comparison(
                "onnxruntime", "optimized", "onnxruntime", "baseline", Ratio(1.017, 0.986, 1.043)
            ),
            Comparison("onnxruntime", "optimized", "torch", "baseline", Ratio(2.625, 2.514, 2.718)),
            Comparison("onnxruntime", "baseline", "torch", "optimized", Ratio(0.871, 0.852, 0.893)),
        ],
        "noise_floors": [NoiseFloor("onnxruntime", Ratio(1.002, 0.981, 1.019))],
        "engine_reports": [
            _engine("baseline", 57, 35_400_000),
            _engine("optimized", 39, 12_800_000),
        ],
        "artifacts": [
            Artifact(
                OUTPUT / "baseline.onnx", "onnx", "ab" * 32, 28_012_345, "baseline", ("x",), ("y",)
            ),
            Artifact(OUTPUT / "engines/model.sm_89.engine", "engine", "0c" * 32, 14_002_000),
        ],
        "not_measured": [],
        "directory": OUTPUT,
        "created": datetime(2026, 3, 4, 7, 8, 9, 123456, tzinfo=timezone(timedelta(hours=2))),
    }


def full_report(**changes: Any) -> Report:
    """The full run, with some arguments of `assemble` changed."""
    return assemble(**{**full_arguments(), **changes})


def empty_report() -> Report:
    """A run without passes, engines, latency, drift or files."""
    return assemble(
        name="nothing",
        source=Source("m.py:build"),
        command=["optfuse", "optimize", "m.py:build"],
        environment={},
        settings={"passes": [], "seed": 0, "threads": 1, "targets": []},
        inputs=[],
        before=ProgramCounts({"relu": 1}, 0, None),
        after=ProgramCounts({"relu": 1}, 0, None),
        steps=[],
    )


def hostile_report() -> Report:
    """A run in which every name that someone else chose tries to break out of its cell."""
    name = " ".join(HOSTILE_NAMES)
    return full_report(
        name=name,
        command=["optfuse", "optimize", *HOSTILE_NAMES],
        environment={name: name},
        inputs=[InputSpec(name, (1, 2))],
        before=ProgramCounts(dict.fromkeys(HOSTILE_NAMES, 3), 12, 34),
        steps=[
            Step(
                "pass",
                name,
                1.5,
                24,
                21,
                sites=tuple(Site(each, each) for each in HOSTILE_NAMES),
                refused=tuple(Refused(each, each) for each in HOSTILE_NAMES),
                undone=name,
            )
        ],
        drifts=[_drift(name, "optimized", math.nan), _drift(name, "baseline", math.inf)],
        measurements=[_measurement(name, "optimized", 2.5)],
        comparisons=[Comparison(name, "optimized", name, "baseline", Ratio(1.5, 1.25, 1.75))],
        noise_floors=[NoiseFloor(name, Ratio(1.01, 0.97, 1.03))],
        engine_reports=[
            EngineReport(name, name, "optimized", (EngineLayer(name, name, (name,)),), 1, 2, 3, 4.5)
        ],
        artifacts=[Artifact(OUTPUT / "a|b\n.onnx", "onnx", "9f" * 32, 1_234)],
        not_measured=[NotMeasured(name, None, name, name)],
    )


def _drift(engine: str, variant: Any, relative_l2: float) -> Drift:
    return Drift(
        engine=engine,
        variant=variant,
        reference="float64 program",
        relative_l2=relative_l2,
        max_abs_over_max_ref=relative_l2 * 1.5,
        cosine=0.9999999,
        sqnr_db=129.9,
        nonfinite=0 if math.isfinite(relative_l2) else 7,
        top1_agreement=1.0,
    )


def _measurement(engine: str, variant: Any, median_ms: float) -> Measurement:
    # Symmetric around the median, in two blocks of unequal length.
    return Measurement(
        engine,
        variant,
        "cpu",
        ((median_ms - 0.25, median_ms + 0.25, median_ms), (median_ms - 0.125, median_ms + 0.125)),
    )


def _engine(variant: Any, correlations: int, activation_bytes: int) -> EngineReport:
    layers = tuple(
        EngineLayer(f"layer {i}", "correlation", (f"node_Conv_{i}", f"node_Relu_{i}"))
        for i in range(correlations)
    )
    copies = (EngineLayer("copy", "slice"),) if variant == "optimized" else ()
    return EngineReport(
        engine="tensorrt-rtx",
        target="sm_89",
        variant=variant,
        layers=layers + copies,
        activation_bytes=activation_bytes,
        weight_bytes=None,
        size_bytes=14_002_000,
        build_seconds=0.64,
        not_measured="no GPU",
    )
