"""What the pipeline makes of its findings: which way round a ratio is, and whose drift is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from optfuse import pipeline, stats
from optfuse.backends import Session
from optfuse.stages import Measurement, Variant, silent
from tests.harness import captured


def measured(engine: str, variant: Variant, milliseconds: float) -> Measurement:
    """Twelve blocks of three samples, a little different in each block for all alike."""
    blocks = tuple((milliseconds * (1 + 0.01 * (block % 3)),) * 3 for block in range(12))
    return Measurement(engine, variant, "cpu", blocks)


def test_a_ratio_above_one_means_that_ours_takes_less_time() -> None:
    comparisons, floors = pipeline._ratios(
        [
            measured("torch", "baseline", 12.0),
            measured("torch", "control", 12.0),
            measured("torch", "optimized", 8.0),
            measured("onnxruntime", "baseline", 3.0),
            measured("onnxruntime", "control", 3.0),
            measured("onnxruntime", "optimized", 4.0),
        ],
        seed=0,
    )
    found = {(c.engine, c.variant, c.against_engine, c.against): c.ratio.ratio for c in comparisons}
    # The blocks vary alike, so the paired ratio is exact but for float64 rounding.
    assert found == {
        ("torch", "optimized", "torch", "baseline"): pytest.approx(12 / 8, rel=1e-12),
        ("onnxruntime", "optimized", "onnxruntime", "baseline"): pytest.approx(3 / 4, rel=1e-12),
        ("onnxruntime", "optimized", "torch", "baseline"): pytest.approx(12 / 4, rel=1e-12),
    }
    verdicts = [
        stats.verdict(each.ratio, stats.noise_floor(floors[0].control)) for each in comparisons
    ]
    assert verdicts == ["faster", "slower", "faster"]
    assert [floor.control.ratio for floor in floors] == [pytest.approx(1.0, rel=1e-12)] * 2


class Giving:
    """A session whose last run gave these outputs."""

    def __init__(self, *outputs: torch.Tensor) -> None:
        self.outputs = outputs

    def fetch(self) -> list[torch.Tensor]:
        return list(self.outputs)


def opened(variant: Variant, output: torch.Tensor) -> tuple[str, Variant, Session]:
    return "torch", variant, cast(Session, cast(Any, Giving(output)))


def test_each_drift_is_of_its_own_variant_against_float64() -> None:
    class Tripling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3

    x = torch.linspace(1, 2, 8)
    exact = x.double() * 3
    found = pipeline._Findings(Path(), artifacts=[])
    sessions = [
        opened("baseline", exact * 1.01),
        opened("control", exact * 1.5),
        opened("optimized", exact * 1.04),
    ]
    pipeline._compare_all(captured(Tripling(), x), sessions, found, silent)
    # Every output is scaled, so the relative distance is the scale's own; 1e-12 is rounding.
    assert {each.variant: each.relative_l2 for each in found.drifts} == {
        "baseline": pytest.approx(0.01, rel=1e-12),
        "optimized": pytest.approx(0.04, rel=1e-12),
    }
