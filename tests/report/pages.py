"""Documents with something for every plot: an ablation, layers, many runs, a bench, a history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from optfuse.report import bench, diff
from optfuse.report.schema import Ablated, Comparison, NoiseFloor
from optfuse.stages import Caveat, Drift, InputSpec, LayerDrift, LayerDrifts, Measurement, Report
from optfuse.stats import Ratio
from tests.report.example import full_report

PASSES = ("fold_conv_bn", "elide_concat", "combine_parallel_convs")
CREATED = datetime(2026, 3, 4, 7, 8, 9, tzinfo=timezone.utc)


def measurement(engine: str, variant: str, median_ms: float, runs: int = 60) -> Measurement:
    """Runs spread around a median, two modes of an uneven size, and one far beyond the others."""
    near = [median_ms * (1 + 0.01 * ((place * 7) % 11 - 5) / 5) for place in range(runs - 1)]
    samples = [*near, median_ms * 3]
    blocks = [samples[place::6] for place in range(6)]
    return Measurement(engine, variant, "cpu", tuple(map(tuple, blocks)))


def layers(names: Sequence[str] = (), suspect: str | None = "conv_act_7") -> LayerDrifts:
    """Forty layers with rounding, a jump at the eighth, one exact and one not finite."""
    names = names or [f"conv_act_{place}" for place in range(40)]
    rows = [
        LayerDrift(
            name=name,
            kind="conv_act",
            module=f"inception3a.branch{place % 4 + 1}.conv",
            equals=(f"relu_{place}",),
            origins=(f"conv2d_{place}", f"relu_{place}"),
            shape=(1, 64, 28, 28),
            relative_l2=2e-7 * (1 + 0.1 * place) * (80 if place >= 7 else 1),
            own_relative_l2=2e-7 * (1 + 0.1 * place),
            growth=80.0 if place == 7 else 1.0 + 0.01 * place,
        )
        for place, name in enumerate(names)
    ]
    if len(rows) > 3:
        rows[2] = replace(rows[2], relative_l2=0.0, own_relative_l2=0.0, growth=None)
        rows[-1] = replace(rows[-1], relative_l2=float("inf"), own_relative_l2=None, growth=None)
    return LayerDrifts("torch", "captured program in float64", tuple(rows), suspect, 10.0)


def ablation(engine: str = "onnxruntime") -> list[Ablated]:
    """Each pass alone, left out, and up to it; the last pass costs 3 %."""
    gains = {"fold_conv_bn": 1.02, "elide_concat": 1.0, "combine_parallel_convs": 0.97}
    rows = []
    so_far = 1.0
    for name, gain in gains.items():
        so_far *= gain
        for how, ratio in (("alone", gain), ("without", 0.9894 / gain), ("up_to", so_far)):
            rows.append(
                Ablated(
                    engine=engine,
                    how=how,  # type: ignore[arg-type]
                    name=name,
                    passes=(name,),
                    operators=139,
                    same_as="baseline" if name == "elide_concat" and how == "alone" else None,
                    measurement=measurement(engine, f"{how} {name}", 12.125 / ratio),
                    ratio=Ratio(ratio, ratio - 0.004, ratio + 0.004),
                    noise_floor=1.005,
                    drift=None,
                )
            )
    return rows


def illustrated_report(**changes: Any) -> Report:
    """The full run of `example`, with an ablation, layers, a caveat and more runs."""
    return full_report(
        **{
            "measurements": [
                measurement("torch", "baseline", 31.5),
                measurement("onnxruntime", "baseline", 12.125),
                measurement("onnxruntime", "control", 12.25),
                measurement("onnxruntime", "optimized", 12.0),
            ],
            "warnings": [
                Caveat("busy", "this machine", "It was busy", "Others ran", "Measure again")
            ],
            "layers": layers(),
            "ablation": ablation(),
            **changes,
        }
    )


POINTS = (
    (0, 3.5e-7, 1.0),
    (2, 7.4e-4, 1.08),
    (5, 2.5e-3, 1.17),
    (7, 3.8e-3, 1.33),
    (8, 4.7e-3, None),
    (15, 8.8e-3, None),
)
"""How many layers are low, the drift, and how many times as fast as with none."""


def mixture(
    points: Sequence[tuple[int, float | None, float | None]] = POINTS,
    chosen: int = 7,
    **changes: Any,
) -> dict[str, Any]:
    """What a report says of 15 layers that a search has parted, with a limit of 0.004."""
    limit = changes.get("max_drift", 0.004)
    return {
        "asked": "mixed",
        "low": "bf16",
        "io": "fp32",
        "layers": 15,
        "low_layers": chosen,
        "calibration": "",
        "max_drift": limit,
        "timed_on": "openvino",
        "reason": "It is the fastest.",
        "curve": [
            {
                "low": low,
                "share": low / 15,
                "relative_l2": drift,
                "ratio": ratio,
                "within": drift is not None and drift <= limit,
                "chosen": low == chosen,
            }
            for low, drift, ratio in points
        ],
        "sensitivities": [],
        **changes,
    }


def mixed_report(**changes: Any) -> Report:
    """The full run of `example`, in a mixture of precisions, with some of `mixture` changed."""
    return full_report(precision=mixture(**changes))


def bench_report(batches: Sequence[int | None] = (1, 8), **changes: Any) -> Report:
    """Three contenders, one of which could not be run."""
    names = {"net@torch": 31.5, "net@onnxruntime": 12.0, "net.onnx@onnxruntime": 12.5}
    runs = [
        bench.BatchRun(
            batch=batch,
            inputs={name: [InputSpec("x", (batch or 1, 3, 224, 224))] for name in names},
            measurements=[
                measurement(name.partition("@")[2], name, median * (batch or 1) ** 0.9)
                for name, median in names.items()
            ],
            versus=[
                bench.Versus("net@onnxruntime", "net@torch", Ratio(2.6, 2.5, 2.7)),
                bench.Versus("net.onnx@onnxruntime", "net@torch", Ratio(2.5, 2.4, 2.6)),
            ],
            control=Ratio(1.001, 0.99, 1.012),
            not_run=[bench.NotRun("net@tensorrt", "no GPU")],
        )
        for batch in batches
    ]
    contenders = [
        bench.Contender(name, name, "source", name.partition("@")[2], "1.0", None)
        for name in (*names, "net@tensorrt")
    ]
    return bench.assemble(
        **{
            "contenders": contenders,
            "runs": runs,
            "ceilings": None,
            "command": ["optfuse", "bench", "net.py:build"],
            "environment": {"cpu_model": "Some CPU", "commit": "feedc0ffee12"},
            "settings": {
                "threads": 1,
                "isolated": False,
                "seed": 0,
                "duration_seconds": 15.0,
                "warmup_ms": 200.0,
                "blocks": [10, 40],
            },
            "created": CREATED,
            **changes,
        }
    )


def diff_report(**changes: Any) -> Report:
    """A program, what the passes made of it with a layer that drifts, and a file without layers."""

    def drift(name: str, relative_l2: float) -> Drift:
        reference = "captured program in float64"
        return Drift("torch", name, reference, relative_l2, 2e-6, 0.9999999, 116.5, 0, 1.0)

    compared = [
        diff.Compared(
            name=name,
            text=name,
            kind=kind,
            engine=name.partition("@")[2],
            version="1.0",
            device="cpu",
            sha256=None,
            samples=[drift(name, relative_l2), drift(name, relative_l2 / 2)],
            worst=0,
            outputs=[],
            layers=found,
            no_layers=reason,
        )
        for name, kind, relative_l2, found, reason in (
            ("net@torch", "source", 1.5e-6, None, None),
            ("net optimized@torch", "source", 1.8e-6, layers(), None),
            ("net.onnx@onnxruntime", "onnx", 1.2e-6, None, "it has other names"),
        )
    ]
    return diff.assemble(
        **{
            "reference": "captured program in float64",
            "compared": compared,
            "with_own": True,
            "inputs": [InputSpec("x", (1, 3, 224, 224))],
            "command": ["optfuse", "diff", "net.py:build", "net.onnx"],
            "environment": {"cpu_model": "Some CPU"},
            "settings": {
                "threads": 1,
                "seed": 0,
                "inputs": "random",
                "data": None,
                "samples": 2,
                "per_layer": True,
                "passes": ["fold_conv_bn"],
            },
            "created": CREATED,
            **changes,
        }
    )


def history(ratios: Sequence[Ratio], **changes: Any) -> list[tuple[str, Any]]:
    """Reports of one model on one engine, a day apart, each of its own commit."""
    return [
        (
            f"day{day}/report.json",
            full_report(
                created=CREATED + timedelta(days=day),
                environment={
                    "cpu_model": "Some CPU",
                    "commit": f"{day}abcdef0123456789",
                    "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1"},
                },
                comparisons=[
                    Comparison("onnxruntime", "optimized", "onnxruntime", "baseline", ratio)
                ],
                noise_floors=[NoiseFloor("onnxruntime", Ratio(1.0, 0.995, 1.004))],
                engine_reports=[],
                measurements=[
                    measurement("onnxruntime", "baseline", 12.0),
                    measurement("onnxruntime", "optimized", 12.0 / ratio.ratio),
                ],
                **changes,
            ).document,
        )
        for day, ratio in enumerate(ratios)
    ]
