"""The gate: every limit held, not held and undecided, and like compared with like."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optfuse.errors import OptfuseError, UsageError
from optfuse.gate import check, failures, quotient
from optfuse.limits import Limits
from optfuse.report.schema import Comparison, NoiseFloor, NotMeasured, dump, parse
from optfuse.report.verdicts import Criterion, Gate
from optfuse.stages import Caveat, Dimension, InputSpec, Measurement, Report
from optfuse.stats import Ratio, paired_ratio
from tests.report.example import full_arguments, full_report

QUIET = Ratio(1.0, 0.996, 1.004)
"""An A/A control whose noise floor is 1.004."""

FASTER = Ratio(1.2, 1.19, 1.21)


def report(
    speedup: Ratio = FASTER,
    floor: Ratio = QUIET,
    median_ms: float = 10.0,
    device: str = "cpu",
    **changes: Any,
) -> Report:
    """The example's run with one measured engine, onnxruntime, written to text and read back.

    Args:
        speedup: of ours over the export as it comes.
        floor: the A/A control.
        median_ms: of ours.
        device: what ran it.
        changes: of any other argument of `assemble`.
    """
    # Around 1, and in no order: what drifts in time has a wider interval.
    shares = [0.982 + 0.004 * (7 * i % 10) for i in range(10)]
    blocks = tuple((median_ms * (share - 0.005), median_ms * (share + 0.005)) for share in shares)
    measured = {
        "measurements": [Measurement("onnxruntime", "optimized", device, blocks)],
        "comparisons": [Comparison("onnxruntime", "optimized", "onnxruntime", "baseline", speedup)],
        "noise_floors": [NoiseFloor("onnxruntime", floor)],
    }
    return parse(dump(full_report(**{**measured, **changes})))


def edited(given: Report, edit: Callable[[dict[str, Any]], object]) -> Report:
    """The report with its document changed in place."""
    document = copy.deepcopy(dict(given.document))
    edit(document)
    return Report(document)


def drift_of(document: Mapping[str, Any], variant: str = "optimized") -> dict[str, Any]:
    """The row of onnxruntime."""
    [row] = [
        row
        for row in document["drift"]
        if (row["engine"], row["variant"]) == ("onnxruntime", variant)
    ]
    found: dict[str, Any] = row
    return found


def with_drift(variant: str = "optimized", **values: Any) -> Report:
    return edited(report(), lambda document: drift_of(document, variant).update(values))


def only(gate: Gate) -> Criterion:
    [criterion] = gate.criteria
    return criterion


def on_onnxruntime(given: Report, limits: Limits, **more: Any) -> Criterion:
    return only(check(given, limits, engines=["onnxruntime"], **more))


# --- Drift


def test_a_drift_below_its_limit_passes() -> None:
    found = on_onnxruntime(report(), Limits(max_drift=1e-5))
    assert (found.outcome, found.value, found.found) == ("passed", 4.0e-7, "4.0e-07")
    assert (found.title, found.allowed) == ("--max-drift on onnxruntime", "<= 1e-05")
    assert found.sentence == (
        "onnxruntime: the drift from the float64 program is 4.0e-07 (relative L2); the limit is "
        "1e-05 at most"
    )


def test_a_planted_drift_fails_with_a_sentence() -> None:
    gate = check(with_drift(relative_l2=0.031), Limits(max_drift=1e-5), engines=["onnxruntime"])
    assert only(gate).outcome == "failed"
    [error] = failures(gate)
    assert error.exit_code == 1
    assert str(error) == (
        "The limit --max-drift on onnxruntime does not hold. onnxruntime: the drift from the "
        "float64 program is 3.1e-02 (relative L2); the limit is 1e-05 at most. Find the layer it "
        "comes from with 'optfuse diff --per-layer', or raise the limit."
    )


def test_a_drift_just_at_its_limit_passes_and_just_above_fails() -> None:
    assert on_onnxruntime(with_drift(relative_l2=1e-5), Limits(max_drift=1e-5)).outcome == "passed"
    above = on_onnxruntime(with_drift(relative_l2=1.0001e-5), Limits(max_drift=1e-5))
    # As many digits as it takes to see it.
    assert (above.outcome, above.found) == ("failed", "1.0001e-05")


@pytest.mark.parametrize("limit", [1e-5, 1e300])
def test_outputs_that_are_not_finite_exceed_every_limit(limit: float) -> None:
    broken = with_drift(relative_l2=None, ratio_to_baseline=None, nonfinite=7)
    absolute = on_onnxruntime(broken, Limits(max_drift=limit))
    relative = on_onnxruntime(broken, Limits(max_drift_ratio=limit))
    for found in (absolute, relative):
        assert (found.outcome, found.value) == ("failed", math.inf)
        assert "7 values are not finite where those of the reference are" in found.sentence
    assert (absolute.found, relative.found) == ("infinity", "infinityx")


def test_exact_outputs_pass_a_limit_of_0() -> None:
    exact = with_drift(relative_l2=0.0)
    assert on_onnxruntime(exact, Limits(max_drift=0.0)).outcome == "passed"
    assert on_onnxruntime(exact, Limits(max_drift_ratio=0.0)).outcome == "passed"


@pytest.mark.parametrize(("limit", "outcome"), [(1.25, "passed"), (1.2, "failed")])
def test_the_drift_ratio_is_to_the_exports_own(limit: float, outcome: str) -> None:
    # 4.0e-7 over 3.2e-7, which is 1.25 up to one rounding.
    found = on_onnxruntime(with_drift(relative_l2=4e-7 - 1e-22), Limits(max_drift_ratio=limit))
    assert found.outcome == outcome
    assert found.value == pytest.approx(1.25, rel=1e-12)
    assert "4.0e-07 (relative L2), and that of the export as it comes is 3.2e-07" in found.sentence


def test_beside_an_exact_export_only_exact_outputs_pass() -> None:
    exact = with_drift("baseline", relative_l2=0.0)
    found = on_onnxruntime(exact, Limits(max_drift_ratio=1000.0))
    assert (found.outcome, found.value) == ("failed", math.inf)
    both = edited(exact, lambda document: drift_of(document).update(relative_l2=0.0))
    assert on_onnxruntime(both, Limits(max_drift_ratio=1.0)).outcome == "passed"


def test_beside_an_export_that_is_not_finite_there_is_no_ratio() -> None:
    infinite = with_drift("baseline", relative_l2=None)
    found = on_onnxruntime(infinite, Limits(max_drift_ratio=2.0))
    assert found.outcome == "not compared"
    assert "the outputs of the export as it comes are infinitely far away" in found.sentence


def test_without_the_exports_own_drift_there_is_no_ratio() -> None:
    gate = check(report(), Limits(max_drift_ratio=2.0))
    # The example has no drift of the export on torch.
    assert {each.on: each.outcome for each in gate.criteria} == {
        "onnxruntime": "passed",
        "torch": "not compared",
        "tensorrt-rtx": "not compared",
    }
    assert gate.passed


@pytest.mark.parametrize(
    ("agreement", "outcome", "text"),
    [(0.999, "passed", "0.999"), (1.0, "passed", "1.000"), (0.99899, "failed", "0.99899")],
)
def test_top1_agreement(agreement: float, outcome: str, text: str) -> None:
    found = on_onnxruntime(with_drift(top1_agreement=agreement), Limits(min_top1=0.999))
    assert (found.outcome, found.found, found.allowed) == (outcome, text, ">= 0.999")


def test_outputs_that_are_no_logits_have_no_top1_agreement() -> None:
    found = on_onnxruntime(with_drift(top1_agreement=None), Limits(min_top1=0.9))
    assert found.outcome == "not compared"
    assert "no output looks like logits" in found.sentence


# --- Speed-up


@pytest.mark.parametrize(
    ("speedup", "limit", "outcome"),
    [
        (Ratio(1.2, 1.19, 1.21), 1.19, "passed"),
        (Ratio(1.2, 1.19, 1.21), 1.2, "undecided"),
        (Ratio(1.2, 1.19, 1.21), 1.21, "undecided"),
        (Ratio(1.2, 1.19, 1.21), 1.22, "failed"),
        # The interval is below the limit, but by less than the noise floor of 1.004.
        (Ratio(0.998, 0.997, 0.999), 1.0, "undecided"),
        (Ratio(0.99, 0.98, 0.999), 1.0, "failed"),
    ],
)
def test_a_speedup_counts_where_its_whole_interval_is_beyond_the_limit(
    speedup: Ratio, limit: float, outcome: str
) -> None:
    assert on_onnxruntime(report(speedup), Limits(min_speedup=limit)).outcome == outcome


def test_the_sentences_of_a_speedup() -> None:
    slow = check(report(Ratio(0.95, 0.94, 0.96)), Limits(min_speedup=1.0), engines=["onnxruntime"])
    assert only(slow).found == "0.95x [0.94, 0.96]"
    assert only(slow).sentence == (
        "onnxruntime: the optimized model is 0.95x [0.94, 0.96] as fast as the export as it comes; "
        "the limit is 1x at least"
    )
    assert failures(slow)[0].next_step == (
        "Find the pass that costs more than it gains with 'optfuse optimize --ablate'"
    )
    near = on_onnxruntime(report(Ratio(0.999, 0.997, 0.9999)), Limits(min_speedup=1.0))
    # Three decimals would say 1.000 of what is below 1.
    assert near.found == "0.9990x [0.9970, 0.9999]"
    assert near.sentence.endswith(", and the noise floor of 1.004x reaches it")
    both = on_onnxruntime(report(Ratio(1.0, 0.9, 1.1)), Limits(min_speedup=1.0))
    assert both.sentence.endswith(", and the interval reaches both sides of it")


def test_undecided_passes_unless_strict() -> None:
    undecided = report(Ratio(1.0, 0.9, 1.1))
    limits = Limits(min_speedup=1.0)
    assert check(undecided, limits, engines=["onnxruntime"]).passed
    strict = check(undecided, limits, engines=["onnxruntime"], strict=True)
    assert not strict.passed
    [error] = failures(strict)
    assert error.exit_code == 1
    assert "Measure for longer with --duration" in error.next_step


def test_the_speedup_is_the_one_over_the_export_on_the_same_engine() -> None:
    comparisons = [
        Comparison("onnxruntime", "optimized", "torch", "baseline", Ratio(3.0, 2.9, 3.1)),
        Comparison("onnxruntime", "baseline", "onnxruntime", "optimized", Ratio(0.5, 0.4, 0.6)),
        Comparison("onnxruntime", "optimized", "onnxruntime", "baseline", Ratio(1.2, 1.1, 1.3)),
    ]
    found = on_onnxruntime(report(comparisons=comparisons), Limits(min_speedup=1.0))
    assert found.value == 1.2


def test_without_a_latency_the_limit_is_no_silent_pass() -> None:
    quiet = report(
        measurements=[],
        comparisons=[],
        not_measured=[NotMeasured("onnxruntime", None, None, "no time was given to it")],
    )
    gate = check(quiet, Limits(min_speedup=1.0), engines=["onnxruntime"])
    assert not gate.passed
    [error] = failures(gate)
    assert (type(error), error.exit_code) == (UsageError, 2)
    assert error.thing == "The limit --min-speedup cannot be checked"
    assert error.cause == ("onnxruntime: the report has no speed-up of it, no time was given to it")


@pytest.mark.parametrize("end", ["low", "ratio", "high"])
@pytest.mark.parametrize("value", [None, 0, -1.0])
def test_an_interval_without_an_end_says_nothing(end: str, value: float | None) -> None:
    broken = edited(report(), lambda document: document["speedups"][0].update({end: value}))
    assert on_onnxruntime(broken, Limits(min_speedup=1.0)).outcome == "not compared"


def test_an_engine_that_is_built_but_cannot_run_here_is_not_compared() -> None:
    gpu = report(not_measured=[NotMeasured("tensorrt-rtx", None, "sm_89", "no GPU")])
    gate = check(gpu, Limits(max_drift=1e-5, min_speedup=1.0))
    assert gate.passed
    found = [each for each in gate.criteria if each.on == "tensorrt-rtx"]
    assert [each.outcome for each in found] == ["not compared"] * 2
    assert found[0].sentence == "tensorrt-rtx: the report has no drift of it, no GPU"


# --- Counts


@pytest.mark.parametrize(("limit", "outcome"), [(120, "passed"), (119, "failed")])
def test_operators(limit: int, outcome: str) -> None:
    found = only(check(report(), Limits(max_operators=limit)))
    assert (found.outcome, found.found, found.on) == (outcome, "120", "")
    assert found.title == "--max-operators"
    assert found.sentence == (
        f"The optimized program has 120 operators; the limit is {limit} at most"
    )


@pytest.mark.parametrize(("limit", "outcome"), [(40, "passed"), (39, "failed")])
def test_engine_layers_are_those_of_the_optimized_engines(limit: int, outcome: str) -> None:
    # 39 layers of arithmetic and a copy; the engine of the export as it comes has 57.
    found = only(check(report(), Limits(max_engine_layers=limit)))
    assert (found.outcome, found.found, found.on) == (outcome, "40", "tensorrt-rtx sm_89")


def test_without_an_engine_that_was_built_its_layers_cannot_be_checked() -> None:
    for given, engines in ((report(engine_reports=[]), []), (report(), ["onnxruntime"])):
        [error] = failures(check(given, Limits(max_engine_layers=40), engines=engines))
        assert (error.exit_code, error.cause) == (2, "The report has no engine that was built")


def test_a_builder_that_told_of_no_layer_is_not_taken_for_an_engine_without_one() -> None:
    silent = edited(
        report(), lambda document: [row.update(layers=0) for row in document["engines"]]
    )
    found = only(check(silent, Limits(max_engine_layers=40)))
    assert found.outcome == "not compared"
    assert "its builder did not tell which layers it has" in found.sentence


# --- Slowdown


def slowdown(now: Report, then: Report, limit: float = 1.05) -> Criterion:
    return on_onnxruntime(now, Limits(max_slowdown=limit), baseline=then)


def environment(**changes: Any) -> dict[str, Any]:
    """The example's machine with some things changed."""
    versions = {"torch": "2.13.0", "onnxruntime": "1.31.1", "optfuse": "0.1.0"}
    known = {"cpu_model": "Some CPU @ 2.50 GHz", "python": "3.12.1", "gpu": None}
    return {**known, "versions": versions, **changes}


@pytest.mark.parametrize(
    ("speedup", "outcome"),
    [
        # 1.2 before: the slowdown is 1.2 over this, with an interval of about 1.2 % either way.
        (Ratio(1.25, 1.24, 1.26), "passed"),
        (Ratio(1.2, 1.19, 1.21), "passed"),
        (Ratio(1.145, 1.135, 1.155), "undecided"),
        (Ratio(1.1, 1.09, 1.11), "failed"),
    ],
)
def test_beside_the_same_export_the_machine_cancels(speedup: Ratio, outcome: str) -> None:
    # The machine is three times as slow as it was, and the export as it comes with it.
    now, then = report(speedup, median_ms=30.0), report(median_ms=10.0)
    found = slowdown(now, then)
    assert found.outcome == outcome
    assert found.value == pytest.approx(1.2 / speedup.ratio, rel=1e-12)
    assert "(10.00 -> 30.00 ms, each relative to the same export as it comes" in found.sentence


def test_a_regression_fails_with_its_sentence() -> None:
    gate = check(
        report(Ratio(1.0, 0.99, 1.01), median_ms=12.0),
        Limits(max_slowdown=1.05),
        baseline=report(median_ms=10.0),
        engines=["onnxruntime"],
    )
    [error] = failures(gate)
    assert error.exit_code == 1
    assert error.cause == (
        "onnxruntime: a run takes 1.20x [1.18, 1.22] as long as in the baseline report (10.00 -> "
        "12.00 ms, each relative to the same export as it comes beside it); the limit is 1.05x at "
        "most"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"versions": {"torch": "2.14.0", "onnxruntime": "1.31.1", "optfuse": "0.1.0"}},
        {"python": "3.13.0"},
        {"gpu": {"name": "NVIDIA H200", "driver": "590.1"}},
    ],
)
def test_after_an_upgrade_the_latencies_themselves_are_compared(changed: dict[str, Any]) -> None:
    # An engine that got slower for everything: the speed-up is what it was.
    now = report(median_ms=13.0, environment=environment(**changed))
    then = report(median_ms=10.0, environment=environment())
    found = slowdown(now, then)
    assert found.outcome == "failed"
    assert found.value == pytest.approx(1.3, rel=1e-9)
    assert "(10.00 -> 13.00 ms, with whatever changed on the machine)" in found.sentence
    assert slowdown(then, now, limit=0.8).outcome == "passed"


def test_an_upgrade_of_optfuse_alone_leaves_the_export_what_it_was() -> None:
    versions = {**environment()["versions"], "optfuse": "0.2.0"}
    now = report(median_ms=13.0, environment=environment(versions=versions))
    found = slowdown(now, report(median_ms=10.0, environment=environment()))
    assert found.value == pytest.approx(1.0, rel=1e-12)


def test_another_program_of_the_same_name_is_compared_by_its_latency() -> None:
    now = edited(
        report(median_ms=13.0), lambda document: document["program"].update(parameters_before=1)
    )
    found = slowdown(now, report(median_ms=10.0))
    assert found.value == pytest.approx(1.3, rel=1e-9)


def test_the_larger_noise_floor_of_both_counts() -> None:
    noisy = Ratio(1.0, 0.8, 1.25)
    for now, then in ((noisy, QUIET), (QUIET, noisy)):
        found = slowdown(report(Ratio(1.0, 0.99, 1.01), floor=now), report(floor=then))
        assert found.outcome == "undecided"
        assert found.sentence.endswith(", and the noise floor of 1.250x reaches it")


def test_what_is_gained_is_no_slowdown() -> None:
    assert slowdown(report(Ratio(1.5, 1.4, 1.6)), report(), limit=1.0).outcome == "passed"
    # A limit below 1 asks for a gain.
    assert slowdown(report(Ratio(1.5, 1.4, 1.6)), report(), limit=0.9).outcome == "passed"
    assert slowdown(report(Ratio(1.21, 1.2, 1.22)), report(), limit=0.9).outcome == "failed"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda document: document["program"].update(name="resnet50"),
            "the model was resnet50 and is googlenet",
        ),
        (
            lambda document: document["program"]["inputs"][0].update(shape=[8, 3, 224, 224]),
            "the inputs was 8x3x224x224 float32 and is 1x3x224x224 float32",
        ),
        (
            lambda document: document["program"]["inputs"][0].update(dtype="float16"),
            "the inputs was 1x3x224x224 float16 and is 1x3x224x224 float32",
        ),
        (
            lambda document: document["settings"].update(threads=8),
            "the number of CPU threads was 8 and is 2",
        ),
        (
            lambda document: document["environment"].update(cpu_model="Other CPU"),
            "the processor was Other CPU and is Some CPU @ 2.50 GHz",
        ),
        (
            lambda document: document["environment"].update(cpu_model=None),
            "the processor was unknown and is Some CPU @ 2.50 GHz",
        ),
        (
            lambda document: document["latency"][0].update(device="NVIDIA H200"),
            "the device was NVIDIA H200 and is cpu",
        ),
        (
            lambda document: document["latency"][0].update(engine="openvino"),
            "onnxruntime: the baseline report has no latency of it",
        ),
    ],
)
def test_what_is_unlike_is_not_compared(
    edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    gate = check(
        report(),
        Limits(max_slowdown=1.05),
        baseline=edited(report(median_ms=9.0), edit),
        engines=["onnxruntime"],
    )
    assert not gate.passed
    [error] = failures(gate)
    assert (type(error), error.exit_code) == (UsageError, 2)
    assert reason in error.cause
    assert "Measure the baseline again under the conditions of this report" in error.next_step


def test_a_processor_that_neither_report_names_may_be_any() -> None:
    unknown = environment(cpu_model=None)
    found = slowdown(report(environment=unknown), report(median_ms=9.0, environment=unknown))
    assert "the processor was unknown and is unknown" in found.sentence


def test_beside_a_gpu_the_processor_may_differ() -> None:
    now = report(device="NVIDIA H200", environment=environment(cpu_model="Other CPU"))
    then = report(device="NVIDIA H200", median_ms=9.0, environment=environment())
    assert slowdown(now, then).outcome == "passed"


def test_an_engine_that_is_gone_is_named() -> None:
    now = edited(
        report(),
        lambda document: document.update(
            drift=[row for row in document["drift"] if row["engine"] != "torch"]
        ),
    )
    torch = Measurement("torch", "optimized", "cpu", ((1.0, 1.1),) * 10)
    then = report(measurements=[*_measurements(), torch], median_ms=9.0)
    gate = check(now, Limits(max_slowdown=1.05), baseline=then)
    found = {each.on: (each.outcome, each.sentence) for each in gate.criteria}
    assert found["onnxruntime"][0] == "passed"
    assert found["torch"] == ("not compared", "torch: the report has no latency of it")
    assert gate.passed
    assert not check(now, Limits(max_slowdown=1.05), baseline=then, strict=True).passed


def _measurements() -> list[Measurement]:
    return [Measurement("onnxruntime", "optimized", "cpu", ((10.0, 10.1),) * 10)]


@pytest.mark.parametrize(
    "samples",
    [
        {"blocks": [2] * 5, "samples_ms": [10.0] * 10},
        {"blocks": [2] * 10, "samples_ms": [0.0] * 20},
        {"blocks": [2] * 10, "samples_ms": [10.0] * 3},
    ],
    ids=["too few blocks", "no time", "blocks without samples"],
)
def test_samples_without_an_interval_are_not_compared(samples: dict[str, Any]) -> None:
    now = report(median_ms=13.0, environment=environment(python="3.13.0"))
    then = edited(
        report(environment=environment()),
        lambda document: document["latency"][0].update(samples),
    )
    found = slowdown(now, then)
    assert found.outcome == "not compared"
    assert found.sentence == "onnxruntime: too little of it was measured for an interval"


def test_without_a_baseline_a_slowdown_cannot_be_checked() -> None:
    [error] = failures(check(report(), Limits(max_slowdown=1.05)))
    assert error.cause == "There is no baseline report to compare with"


def test_what_changed_since_the_baseline_is_said() -> None:
    then = report(environment=environment(commit="0123456789abcdef"))
    now = report(
        environment=environment(versions={"torch": "2.14.0", "onnxruntime": "1.31.1"}),
    )
    gate = check(now, Limits(max_drift=1.0), baseline=then)
    assert gate.facts == (
        "baseline report: written 2026-03-04T05:08:09+00:00, commit 01234567",
        "versions: torch was 2.13.0 and is 2.14.0, optfuse was 0.1.0 and is -",
    )
    assert check(now, Limits(max_drift=1.0)).facts == ()


# --- The whole


def test_every_limit_has_its_criteria_in_order() -> None:
    limits = Limits(1e-5, 2.0, 0.99, 1.1, 1.05, 200, 40)
    gate = check(report(), limits, baseline=report(median_ms=9.0))
    assert list(dict.fromkeys(each.option for each in gate.criteria)) == [
        "--max-drift",
        "--max-drift-ratio",
        "--min-top1",
        "--min-speedup",
        "--max-slowdown",
        "--max-operators",
        "--max-engine-layers",
    ]
    assert gate.name == "googlenet"
    assert gate.passed
    assert failures(gate) == []


def test_failures_come_before_what_could_not_be_checked() -> None:
    gate = check(
        report(engine_reports=[]), Limits(max_operators=1, max_engine_layers=40, max_drift=1.0)
    )
    assert [(type(each), each.exit_code) for each in failures(gate)] == [
        (OptfuseError, 1),
        (UsageError, 2),
    ]


def test_doubts_about_the_latencies_are_passed_on() -> None:
    doubt = Caveat("busy", "this machine", "It was busy", "Something ran", "Stop it")
    gate = check(report(warnings=[doubt]), Limits(max_operators=200))
    assert gate.warnings == ("this machine: It was busy. Something ran. Stop it.",)


def test_an_engine_that_the_report_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="It has onnxruntime, torch, tensorrt-rtx"):
        check(report(), Limits(max_drift=1.0), engines=["openvino"])


def test_a_report_without_an_engine_has_nothing_to_hold_a_drift_against() -> None:
    empty = report(drifts=[], measurements=[], comparisons=[], noise_floors=[], engine_reports=[])
    for limits in (Limits(max_drift=1.0), Limits(min_speedup=1.0), Limits(min_top1=0.5)):
        [error] = failures(check(empty, limits))
        assert (error.exit_code, error.cause) == (2, "The report has no engine")


def test_a_report_is_not_compared_with_itself() -> None:
    with pytest.raises(UsageError, match="The baseline is the very same report"):
        check(report(), Limits(max_slowdown=1.1), baseline=report())


@pytest.mark.parametrize("kind", ["bench", "diff"])
def test_other_kinds_of_reports_are_refused(kind: str) -> None:
    other = edited(report(), lambda document: document.update(kind=kind))
    for now, then in ((other, None), (report(), other)):
        with pytest.raises(UsageError, match=f"A report of the kind '{kind}' cannot be checked"):
            check(now, Limits(max_slowdown=1.1), baseline=then)


def test_hostile_names_are_shown_on_one_line() -> None:
    name = "a\n::error::b\x1b[31m%s{0}"
    hostile = edited(report(), lambda document: drift_of(document).update(engine=name))
    gate = check(hostile, Limits(max_drift=1e-9, min_speedup=9.0))
    texts = [text for each in gate.criteria for text in (each.on, each.sentence)]
    assert all(text.isprintable() for text in texts)
    assert any("%s{0}: the drift" in text for text in texts)


# --- The quotient of two ratios


def test_the_quotient_worked_out_by_hand() -> None:
    # Half-widths 3 % and 4 % on a log scale give one of 5 %.
    over = Ratio(1.2, 1.2 * math.exp(-0.03), 1.2 * math.exp(0.03))
    under = Ratio(1.5, 1.5 * math.exp(-0.04), 1.5 * math.exp(0.04))
    found = quotient(over, under)
    # 1e-12: a few roundings of float64.
    assert found.ratio == pytest.approx(0.8, rel=1e-12)
    assert found.low == pytest.approx(0.8 * math.exp(-0.05), rel=1e-12)
    assert found.high == pytest.approx(0.8 * math.exp(0.05), rel=1e-12)


def test_the_ends_that_push_the_same_way_go_together() -> None:
    over = Ratio(1.0, math.exp(-0.03), math.exp(0.3))
    under = Ratio(1.0, math.exp(-0.4), math.exp(0.04))
    found = quotient(over, under)
    assert math.log(found.low) == pytest.approx(-0.05, rel=1e-12)
    assert math.log(found.high) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("beside", ["an export", "nothing"])
def test_its_interval_covers_the_true_quotient(beside: str) -> None:
    """Two reports of 12 blocks each, with 2 % noise: 95 of 100 intervals hold the true slowdown.

    300 simulated pairs: with 95 % each, fewer than 275 of them do in less than 1 of 100 cases.
    """
    random = np.random.default_rng(7)

    def blocks(latency_ms: float) -> list[list[float]]:
        return [list(latency_ms * np.exp(0.02 * random.standard_normal(3))) for _ in range(12)]

    covered = 0
    for seed in range(300):
        now, then = (
            paired_ratio(
                blocks(10.0) if beside == "an export" else [[1.0]] * 12,
                blocks(latency_ms),
                seed=seed,
                resamples=400,  # enough for a 95 % quantile
            )
            for latency_ms in (8.4, 8.0)
        )
        found = quotient(then, now)
        covered += found.low <= 1.05 <= found.high
    assert covered >= 275


# --- Open dimensions


def at_points(*points: str, slower_at: str = "", **drifts: float) -> Report:
    """A run at points, with a drift of 4e-7 and a speed-up of 1.2 at each but for what is said."""
    [one] = [each for each in full_arguments()["drifts"] if each.variant == "baseline"]
    return report(
        drifts=[
            replace(one, variant=variant, at=at, relative_l2=drifts.get(at[-1:] + variant, 4e-7))
            for at in points
            for variant in ("baseline", "optimized")
        ],
        measurements=[
            replace(_measured(20.0 if at == slower_at else 10.0), at=at) for at in points
        ],
        comparisons=[
            Comparison("onnxruntime", "optimized", "onnxruntime", "baseline", FASTER, at)
            for at in points
        ],
        noise_floors=[NoiseFloor("onnxruntime", QUIET, at) for at in points],
        inputs=[InputSpec("x", ("N", 3, 224, 224))],
        dimensions=[Dimension("N", 1, 2, 4)],
        environment=environment(),
        engine_reports=[],
    )


def _measured(median_ms: float) -> Measurement:
    shares = [0.982 + 0.004 * (7 * i % 10) for i in range(10)]
    blocks = tuple((median_ms * (share - 0.005), median_ms * (share + 0.005)) for share in shares)
    return Measurement("onnxruntime", "optimized", "cpu", blocks)


def test_a_limit_holds_at_every_point_and_says_at_which_it_does_not() -> None:
    given = at_points("N=1", "N=2", "N=4", **{"2optimized": 3e-3})
    gate = check(given, Limits(max_drift=1e-5, max_drift_ratio=2.0, min_speedup=1.1))
    assert [(each.option, each.on, each.outcome) for each in gate.criteria] == [
        (
            option,
            f"onnxruntime at {at}",
            "failed" if at == "N=2" and "drift" in option else "passed",
        )
        for option in ("--max-drift", "--max-drift-ratio", "--min-speedup")
        for at in ("N=1", "N=2", "N=4")
    ]
    first, _ = failures(gate)
    assert str(first).startswith(
        "The limit --max-drift on onnxruntime at N=2 does not hold. onnxruntime at N=2: the drift "
        "from the float64 program is 3.0e-03 (relative L2); the limit is 1e-05 at most."
    )


def test_each_drift_ratio_is_to_the_exports_own_at_the_same_point() -> None:
    given = at_points("N=1", "N=2", **{"2optimized": 8e-7, "2baseline": 8e-7})
    ratios = {(row["at"], row["ratio_to_baseline"]) for row in given.document["drift"]}
    assert ratios == {("N=1", 1.0), ("N=2", 1.0)}
    assert check(given, Limits(max_drift_ratio=1.0)).passed


def test_equal_points_of_two_reports_are_compared() -> None:
    then = at_points("N=1", "N=2", "N=4")
    slower = edited(
        at_points("N=1", "N=2", "N=8", slower_at="N=2"),
        # Another version, so that the latencies themselves are compared.
        lambda document: document["environment"]["versions"].update(torch="2.14.0"),
    )
    gate = check(slower, Limits(max_slowdown=1.05), baseline=then)
    assert {each.on: each.outcome for each in gate.criteria} == {
        "onnxruntime at N=1": "passed",
        "onnxruntime at N=2": "failed",
        "onnxruntime at N=8": "not compared",
        "onnxruntime at N=4": "not compared",
    }
    told = {each.on: each.sentence for each in gate.criteria}
    assert told["onnxruntime at N=8"] == (
        "onnxruntime at N=8: the baseline report has no latency of it"
    )
    assert told["onnxruntime at N=4"] == "onnxruntime at N=4: the report has no latency of it"


def test_a_point_that_an_engine_failed_at_is_not_compared() -> None:
    given = edited(
        at_points("N=1", "N=2"),
        lambda document: document.update(
            not_measured=[
                {
                    **{"engine": "onnxruntime", "variant": None, "target": None},
                    **{"reason": "it failed: Out of memory", "at": "N=4"},
                }
            ]
        ),
    )
    gate = check(given, Limits(max_drift=1e-5))
    assert [(each.on, each.outcome) for each in gate.criteria] == [
        ("onnxruntime at N=1", "passed"),
        ("onnxruntime at N=2", "passed"),
        ("onnxruntime at N=4", "not compared"),
    ]
    assert gate.criteria[-1].sentence == (
        "onnxruntime at N=4: the report has no drift of it, it failed: Out of memory"
    )


def test_an_open_size_is_not_compared_with_a_fixed_one() -> None:
    gate = check(at_points("N=1"), Limits(max_slowdown=1.05), baseline=report())
    assert "the inputs was 1x3x224x224 float32 and is Nx3x224x224 float32" in only(gate).sentence
