"""The document: what `assemble` derives, strict JSON, the schema, and reading it back."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from optfuse.errors import OptfuseError
from optfuse.report import markdown, schema
from optfuse.report.schema import Comparison, NoiseFloor, NotMeasured
from optfuse.stages import Drift, Report, Step
from optfuse.stats import Ratio
from tests.report.example import (
    STEPS,
    empty_report,
    full_arguments,
    full_report,
    hostile_report,
)


@pytest.mark.parametrize("build", [full_report, empty_report, hostile_report])
def test_every_document_satisfies_the_schema(build: Callable[[], Report]) -> None:
    document = json.loads(schema.dump(build()))

    jsonschema.Draft202012Validator.check_schema(schema.json_schema())
    jsonschema.Draft202012Validator(schema.json_schema()).validate(document)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.pop("drift"),
        lambda document: document.update(surprise=1),
        lambda document: document["steps"][0].pop("undone"),
        lambda document: document["latency"][0].update(median_ms=None),
        lambda document: document["speedups"][0].update(verdict="amazing"),
        lambda document: document["artifacts"][0].update(sha256="abc"),
        lambda document: document["engines"][0].update(layers="57"),
        lambda document: document["settings"].pop("threads"),
        lambda document: document.update(created="yesterday"),
    ],
)
def test_the_schema_is_strict(spoil: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(schema.dump(full_report()))
    spoil(document)

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema.json_schema()).validate(document)


def test_the_schema_is_closed_at_every_row() -> None:
    rows = ["step", "drift", "latency", "speedup", "engine", "artifact", "input"]
    for name in rows:
        assert schema.json_schema()["$defs"][name]["additionalProperties"] is False, name


@pytest.mark.parametrize("build", [full_report, empty_report, hostile_report])
def test_a_document_survives_being_written_and_read(build: Callable[[], Report]) -> None:
    report = build()
    text = schema.dump(report)

    assert schema.parse(text) == report
    assert schema.dump(schema.parse(text)) == text
    assert text.isascii()
    assert text.endswith("}\n")


def test_program_counts_are_sums_over_the_types() -> None:
    program = full_report().document["program"]

    assert (program["operators_before"], program["operators_after"]) == (196, 120)
    assert program["operators_by_type_after"] == {"conv_act": 57, "cat": 25, "conv2d": 38}
    assert (program["parameters_before"], program["parameters_after"]) == (6_998_552, 6_990_001)
    assert (program["flops_before"], program["flops_after"]) == (None, 3_005_000_000)
    assert program["inputs"] == [{"name": "x", "shape": [1, 3, 224, 224], "dtype": "float32"}]


def test_latency_statistics_are_derived_from_the_samples() -> None:
    row = full_report().document["latency"][3]

    assert (row["engine"], row["variant"], row["device"]) == ("onnxruntime", "optimized", "cpu")
    assert row["samples_ms"] == [11.75, 12.25, 12.0, 11.875, 12.125]
    assert row["blocks"] == [3, 2]
    # Exact in binary: the median is the middle sample, the mean of symmetric samples its centre.
    assert (row["median_ms"], row["mean_ms"]) == (12.0, 12.0)
    # Four intervals between five samples: p90 lies 0.6 of the way from the fourth to the last.
    assert row["p90_ms"] == pytest.approx(12.125 + 0.6 * 0.125, rel=1e-12)  # float64 rounding
    assert row["throughput_per_s"] == pytest.approx(1000 / 12, rel=1e-12)  # float64 rounding


def test_drift_stands_beside_the_baseline_of_the_same_engine() -> None:
    baseline, optimized, alone = full_report().document["drift"]

    assert baseline["ratio_to_baseline"] == 1.0
    assert optimized["baseline_relative_l2"] == 3.2e-7
    assert optimized["ratio_to_baseline"] == pytest.approx(1.25, rel=1e-12)  # float64 rounding
    assert (alone["engine"], alone["baseline_relative_l2"]) == ("torch", None)
    assert alone["ratio_to_baseline"] is None


def test_drift_has_no_ratio_to_an_exact_baseline_or_to_another_reference() -> None:
    def drift(variant: Any, relative_l2: float, reference: str = "float64 program") -> Drift:
        return Drift("torch", variant, reference, relative_l2, 2e-7, 1.0, None, 0, None)

    exact = full_report(drifts=[drift("baseline", 0.0), drift("optimized", 3e-7)])
    other = full_report(drifts=[drift("baseline", 2e-7, "eager"), drift("optimized", 3e-7)])

    assert exact.document["drift"][1]["baseline_relative_l2"] == 0.0
    assert exact.document["drift"][1]["ratio_to_baseline"] is None
    assert other.document["drift"][1]["baseline_relative_l2"] is None


def test_numbers_that_are_not_finite_become_null() -> None:
    step = Step("pass", "broken", 0.5, 7, 6, relative_l2=math.inf, undone="it is infinite")
    drift = Drift("torch", "optimized", "float64", math.nan, math.inf, 0.5, -math.inf, 4, None)
    document = full_report(
        steps=[step], drifts=[drift], environment={"load": [math.nan, 0.5], "deep": {"x": math.inf}}
    ).document

    assert document["steps"][0]["relative_l2"] is None
    assert document["drift"][0]["relative_l2"] is None
    assert document["drift"][0]["sqnr_db"] is None
    assert document["environment"] == {"load": [None, 0.5], "deep": {"x": None}}
    assert schema.parse(schema.dump(Report(document))) == Report(document)


def test_settings_of_any_type_become_json() -> None:
    import numpy as np

    settings = {"count": np.int64(3), "ratio": np.float32(0.5), "file": Path("a/b"), "set": {2, 1}}
    step = Step("pass", "any", 0.5, 7, 6, settings=settings)

    expected = {"count": 3, "ratio": 0.5, "file": "a/b", "set": [1, 2]}
    assert schema.step_document(step)["settings"] == expected


def test_the_larger_noise_floor_of_the_two_engines_decides() -> None:
    comparison = Comparison("onnxruntime", "optimized", "torch", "baseline", Ratio(1.1, 1.05, 1.15))
    quiet = NoiseFloor("onnxruntime", Ratio(1.0, 0.99, 1.01))
    noisy = NoiseFloor("torch", Ratio(1.0, 0.8, 1.25))

    def row(*floors: NoiseFloor) -> dict[str, Any]:
        report = full_report(comparisons=[comparison], noise_floors=floors)
        speedup: dict[str, Any] = report.document["speedups"][0]
        return speedup

    assert (row(quiet)["verdict"], row(quiet)["noise_floor"]) == ("faster", pytest.approx(1 / 0.99))
    assert (row(quiet, noisy)["verdict"]) == "undecided"
    assert row(quiet, noisy)["noise_floor"] == pytest.approx(1.25)  # exp(log(x)), default 1e-6
    assert (row()["verdict"], row()["noise_floor"]) == ("faster", None)


def test_what_engine_reports_do_not_measure_is_added_once() -> None:
    stated = NotMeasured("tensorrt-rtx", "optimized", "sm_89", "no GPU")
    document = full_report(not_measured=[stated]).document

    assert document["not_measured"] == [
        {"engine": "tensorrt-rtx", "variant": variant, "target": "sm_89", "reason": "no GPU"}
        for variant in ("optimized", "baseline")
    ]


def test_engines_hold_their_layers() -> None:
    baseline, optimized = full_report().document["engines"]

    assert baseline["layers_by_type"] == {"correlation": 57}
    assert (optimized["layers"], optimized["layers_by_type"]) == (
        40,
        {"correlation": 39, "slice": 1},
    )
    assert optimized["layer_table"][2] == {
        "name": "layer 2",
        "kind": "correlation",
        "nodes": ["node_Conv_2", "node_Relu_2"],
    }


def test_paths_inside_the_folder_are_relative_to_it() -> None:
    inside = full_report().document["artifacts"]
    outside = full_report(directory=Path("/elsewhere")).document["artifacts"]

    assert [row["path"] for row in inside] == ["baseline.onnx", "engines/model.sm_89.engine"]
    assert outside[0]["path"] == "/home/someone/out/baseline.onnx"


def test_time_is_utc_and_the_command_can_be_pasted() -> None:
    document = full_report().document

    assert document["created"] == "2026-03-04T05:08:09+00:00"
    assert document["command"].endswith("--output 'my folder'")
    assert empty_report().document["created"].endswith("+00:00")


def test_text_keeps_the_order_of_keys_and_numbers_on_one_line() -> None:
    arguments = full_arguments()
    measurement = arguments["measurements"][0]
    many = type(measurement)("torch", "baseline", "cpu", ((3.25, 3.5, 3.75) * 200,))
    text = schema.dump(full_report(measurements=[many]))

    assert list(json.loads(text)) == list(schema.json_schema()["properties"])
    samples = next(line for line in text.splitlines() if '"samples_ms"' in line)
    assert samples.count("3.75") == 200
    assert text.splitlines()[1] == '  "schema_version": 2,'


def test_steps_keep_sites_refusals_and_why_they_were_undone() -> None:
    steps = full_report().document["steps"]

    assert [step["name"] for step in steps] == [step.name for step in STEPS]
    assert steps[1]["matched"] == 57
    assert steps[1]["sites"][4] == {
        "site": "conv2d_4",
        "note": "folded batch_norm_4",
        "involved": None,
    }
    assert steps[1]["refused"][1]["reason"] == "the batch norm is in training mode"
    assert steps[2]["undone"].startswith("in float64 its outputs moved")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "It is not valid JSON: Expecting value"),
        ('{"schema_version": 1', "It is not valid JSON"),
        ('{"schema_version": NaN}', "It is not valid JSON: NaN is not a JSON number"),
        ("[" * 100_000, "It is not valid JSON"),
        ("[1, 2]", "It is JSON, but it has no 'schema_version'"),
        ('{"name": "x"}', "It is JSON, but it has no 'schema_version'"),
        ('{"schema_version": true}', "It is JSON, but it has no 'schema_version'"),
        ('{"schema_version": 3}', "Its schema version is 3, and this optfuse reads up to 2"),
        ('{"schema_version": 0}', "There never was a schema version 0"),
        ('{"schema_version": 2}', "Its 'kind' is none of optimize, bench, diff"),
        ('{"schema_version": 2, "kind": []}', "Its 'kind' is none of optimize, bench, diff"),
        ('{"schema_version": 1, "n": 1e999}', "It is not valid JSON: 1e999 is too large"),
        ('{"schema_version": 1, "created": "x"}', "It lacks 'command', 'source', 'settings'"),
    ],
)
def test_what_is_no_report_is_refused_with_a_sentence(text: str, cause: str) -> None:
    with pytest.raises(OptfuseError) as caught:
        schema.parse(text)

    assert caught.value.thing == "The report cannot be read"
    assert caught.value.cause.startswith(cause)
    assert "optfuse" in caught.value.next_step


def test_assembling_leaves_its_arguments_alone() -> None:
    arguments = full_arguments()
    kept = copy.deepcopy(arguments)
    full_report(**arguments)

    assert arguments == kept


def test_a_report_of_version_1_still_opens_and_prints() -> None:
    text = (Path(__file__).parent / "data" / "report-v1.json").read_text(encoding="utf-8")
    assert json.loads(text)["schema_version"] == 1
    document = schema.parse(text).document
    assert (document["schema_version"], document["kind"]) == (2, "optimize")
    assert (document["warnings"], document["layers"], document["ablation"]) == ([], None, [])
    jsonschema.validate(document, schema.json_schema())
    assert markdown.render(Report(document)).startswith("# squeezenet: ")


@pytest.mark.parametrize(
    ("path", "value", "cause"),
    [
        (("latency", 0, "median_ms"), "fast", "At $.latency[0].median_ms: 'fast' is not of type"),
        (("latency", 0, "samples_ms"), [], "At $.latency[0].samples_ms: [] should be non-empty"),
        (("speedups", 0, "verdict"), "great", "At $.speedups[0].verdict: 'great' is not one of"),
        (("program", "operators_after"), -1, "At $.program.operators_after: -1 is less than"),
        (("steps",), "x" * 1000, "At $.steps: it breaks the schema's 'type'"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_place(
    path: tuple[str | int, ...], value: Any, cause: str
) -> None:
    document = json.loads(schema.dump(full_report()))
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(OptfuseError) as caught:
        schema.parse(json.dumps(document))
    assert caught.value.cause.startswith(cause)
