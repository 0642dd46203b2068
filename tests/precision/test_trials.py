"""The search on a trained network: int8 within a budget, and what it measures by."""

from __future__ import annotations

import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models import digits
from optfuse import backends
from optfuse.errors import OutputError
from optfuse.export import export
from optfuse.float64 import run_float64
from optfuse.measure import Schedule
from optfuse.precision.floats import Lowering
from optfuse.precision.int8 import SCHEMES, Ranges, calibrate, layers, quantize
from optfuse.precision.mixed import Choice, most_evaluations, search
from optfuse.precision.trials import (
    file_drift,
    file_times,
    float64_outputs,
    int8_written,
    program_drift,
    split,
)
from optfuse.stages import Artifact, BuildOptions, Program
from tests.harness import captured, optimized, scramble

needs_onnxruntime = pytest.mark.skipif(
    backends.get("onnxruntime").unavailable() is not None,
    reason=str(backends.get("onnxruntime").unavailable()),
)


@cache
def images() -> list[list[torch.Tensor]]:
    """The held-out images one by one, each 1x1x8x8."""
    with np.load(digits.HELD_OUT) as arrays:
        return [[image[None]] for image in torch.from_numpy(arrays["input"])]


@cache
def original() -> Program:
    return captured(digits.build(), *images()[0], name="digits")


@cache
def faster() -> Program:
    return optimized(original(), "all")


@cache
def reference() -> list[torch.Tensor]:
    return float64_outputs(original(), split(images())[1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(faster(), tmp_path_factory.mktemp("digits") / "model.onnx")


@pytest.fixture(scope="module")
def ranges(exported: Artifact) -> Ranges:
    return calibrate(exported, split(images())[0])


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    wide, exact = torch.cat(ours).double(), torch.cat(theirs).double()
    return float(torch.linalg.vector_norm(wide - exact) / torch.linalg.vector_norm(exact))


# Which samples


def test_no_sample_serves_for_both() -> None:
    calibrating, judging = split(range(10))
    assert calibrating == [0, 2, 4, 6, 8]
    assert judging == [1, 3, 5, 7, 9]


def test_more_than_enough_are_passed_over_evenly() -> None:
    calibrating, judging = split(range(896))
    assert len(calibrating) == 256
    assert len(judging) == 64
    assert set(calibrating).isdisjoint(judging)
    assert calibrating[0] == 0
    assert calibrating[-1] >= 892
    steps = {b - a for a, b in pairwise(judging)}
    assert steps == {14}
    assert split(range(896)) == (calibrating, judging)


def test_one_sample_has_to_serve_for_both() -> None:
    assert split(["one"]) == (["one"], ["one"])
    assert split([]) == ([], [])


# What is measured


def test_the_reference_is_the_captured_program_in_float64() -> None:
    found = reference()
    assert len(found) == 64
    assert all(each.dtype is torch.float64 for each in found)
    [exact] = run_float64(original().graph_module, tuple(images()[1]), {})
    assert torch.equal(found[0], exact)


def test_inputs_by_keyword_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
            return {"first": self.linear(x) * scale, "second": x.sum(1)}

    generator = torch.Generator().manual_seed(1)
    samples = [
        [torch.randn(2, 4, generator=generator), torch.rand(3, generator=generator)]
        for _ in range(3)
    ]
    two = captured(scramble(Two()), samples[0][0], kwargs={"scale": samples[0][1]})
    exact = float64_outputs(two, samples)
    assert [tuple(each.shape) for each in exact] == [(2, 3), (2,)] * 3
    found = program_drift(lambda high: two, samples, exact)([])
    # What float32 rounds, 6e-8 at a time.
    assert 0 < found < 1e-6


@needs_onnxruntime
def test_the_drift_of_a_file_is_over_all_samples(
    exported: Artifact, ranges: Ranges, tmp_path: Path
) -> None:
    judging = split(images())[1]
    drift_of = file_drift(int8_written(exported, ranges, "openvino"), judging, reference())
    high = layers(exported)[:7]
    artifact = quantize(exported, ranges, tmp_path / "int8.onnx", high=high, scheme="openvino")
    found = []
    with backends.get("onnxruntime").open(artifact, BuildOptions()) as session:
        for sample in judging:
            session.bind(sample)
            session.run()
            found += session.fetch()
    assert drift_of(high) == pytest.approx(distance(found, reference()), rel=1e-9)
    # Float32 through twelve layers, which rounds at 6e-8.
    assert drift_of(layers(exported)) < 1e-6


def test_the_drift_of_a_program(exported: Artifact) -> None:
    lowering = Lowering(faster(), "bf16")
    drift_of = program_drift(lowering.program, split(images())[1], reference())
    every = lowering.layers
    # bf16 keeps 8 bits: 2^-9 a rounding, and some dozens of them in a row.
    assert 1e-3 < drift_of([]) < 2e-2
    assert drift_of(every) < 1e-6


@needs_onnxruntime
def test_times_are_of_each_choice(exported: Artifact, ranges: Ranges) -> None:
    times = file_times(
        int8_written(exported, ranges, "onnxruntime"),
        images()[0],
        engine="onnxruntime",
        options=BuildOptions(),
        schedule=Schedule(budget_seconds=0.1, min_blocks=1, warmup_ms=1),
    )
    found = times([layers(exported), [], layers(exported)])
    assert len(found) == 3
    assert all(each > 0 for each in found)


@needs_onnxruntime
def test_nothing_is_left_of_a_trial(
    exported: Artifact, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    judging = split(images())[1][:2]
    written = int8_written(exported, ranges, "onnxruntime")
    file_drift(written, judging, reference()[:2])([])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match="A trial's files cannot be written"):
        file_drift(written, judging, reference()[:2])([])


# The search


@needs_onnxruntime
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_mixture_keeps_to_its_budget_and_keeps_what_hurts_high(
    exported: Artifact, ranges: Ranges, scheme: str
) -> None:
    judging = split(images())[1]
    names = layers(exported, ranges)
    drift_of = file_drift(int8_written(exported, ranges, scheme), judging, reference())
    whole = drift_of([])
    choice = search(names, drift_of, whole / 2)
    assert choice.evaluations <= most_evaluations(15) == 32
    assert choice.point.within
    assert drift_of(choice.high) == choice.point.relative_l2 <= whole / 2
    low = [name for name in names if name not in choice.high]
    assert 3 <= len(low) <= 13
    check_the_order(choice, low)
    # From what float32 rounds to what int8 does, and hardly ever down between.
    assert (choice.curve[0].low, choice.curve[-1].low) == (0, 15)
    drifts = [each.relative_l2 for each in choice.curve]
    assert drifts[0] < 1e-6
    assert drifts[-1] == whole
    assert all(later > earlier * 0.8 for earlier, later in pairwise(drifts))


def check_the_order(choice: Choice, low: list[str]) -> None:
    """The layers that stay high are those that hurt: their mean sensitivity is above that of the
    rest, and the worst is among them."""
    of = {each.layers[0]: each.relative_l2 for each in choice.sensitivities}
    assert choice.sensitivities[-1].layers[0] in choice.high
    assert np.mean([of[name] for name in choice.high]) > 1.5 * np.mean([of[name] for name in low])


@needs_onnxruntime
def test_a_mixture_reads_as_well_as_float32(
    exported: Artifact, ranges: Ranges, tmp_path: Path
) -> None:
    judging = split(images())[1]
    drift_of = file_drift(int8_written(exported, ranges, "onnxruntime"), judging, reference())
    choice = search(layers(exported), drift_of, 0.01)
    artifact = quantize(exported, ranges, tmp_path / "mixed.onnx", high=choice.high)
    labels = torch.from_numpy(np.load(digits.LABELS)).long()[1::2]
    with backends.get("onnxruntime").open(artifact, BuildOptions()) as session:
        right = 0
        for sample, label in zip(images()[1::2], labels, strict=True):
            session.bind(sample)
            session.run()
            right += int(session.fetch()[0].argmax()) == int(label)
    # 440 of 448 in float32. Half a percent: a third of the drift of int8, which loses up to one.
    assert right >= 440 - 2


def test_a_mixture_of_bf16(exported: Artifact) -> None:
    lowering = Lowering(faster(), "bf16")
    drift_of = program_drift(lowering.program, split(images())[1][:16], reference()[:16])
    whole = drift_of([])
    choice = search(lowering.layers, drift_of, whole / 2)
    assert choice.point.relative_l2 <= whole / 2
    assert 0 < choice.point.low < len(lowering.layers)
