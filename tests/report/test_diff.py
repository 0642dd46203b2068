"""The report of `optfuse diff`: its document, and what it shows of it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from optfuse.errors import OptfuseError
from optfuse.report import diff, kinds, markdown, schema, terminal
from optfuse.report.diff import Compared, assemble, at_least
from optfuse.stages import Drift, InputSpec, LayerDrift, LayerDrifts, Report
from tests.report.example import HOSTILE_NAMES

REFERENCE = "captured program in float64"


def drift(relative_l2: float, name: str = "net@torch") -> Drift:
    finite = math.isfinite(relative_l2)
    return Drift(
        engine="torch",
        variant=name,
        reference=REFERENCE,
        relative_l2=relative_l2,
        max_abs_over_max_ref=relative_l2 * 1.5,
        cosine=0.9999999 if finite else 0.0,
        sqnr_db=101.25 if finite else -math.inf,
        nonfinite=0 if finite else 7,
        top1_agreement=1.0,
    )


def output(**changes: Any) -> dict[str, Any]:
    return {
        "name": "logits",
        "shape": (2, 5),
        "dtype": "float32",
        "relative_l2": 2.5e-7,
        "max_abs": 3.21e-6,
        "max_abs_over_max_ref": 3e-7,
        "cosine": 0.9999999,
        "sqnr_db": 132.04,
        "nonfinite": 0,
        "top1_agreement": 1.0,
        "elements": 10,
        "mismatched": None,
        "both_nonfinite": 0,
        "reference_nonfinite": 0,
        "tolerances": {
            "atol": 3.21e-6,
            "rtol": 0.0415,
            "atol_beside_rtol": 3.1e-6,
            "beside_rtol": 1e-5,
        },
        **changes,
    }


def layer(name: str, grown: float | None, relative_l2: float = 2e-7, **changes: Any) -> LayerDrift:
    row = LayerDrift(
        name=name,
        kind="conv_act",
        module="block.conv",
        equals=("relu_2",),
        origins=("conv2d_2", "relu_2"),
        shape=(2, 8, 10, 10),
        relative_l2=relative_l2,
        own_relative_l2=1e-7,
        growth=grown,
    )
    return replace(row, **changes)


def layers(*rows: LayerDrift, suspect: str | None = None) -> LayerDrifts:
    return LayerDrifts("onnxruntime", REFERENCE, rows, suspect, 8.0)


def compared(name: str, *relative_l2: float, **changes: Any) -> Compared:
    samples = [drift(each, name) for each in relative_l2]
    one = Compared(
        name=name,
        text=name.partition("@")[0],
        kind="onnx",
        engine=name.rpartition("@")[2],
        version="1.31.1",
        device="cpu",
        sha256="ab" * 32,
        samples=samples,
        worst=max(range(len(samples)), key=lambda index: samples[index].relative_l2),
        outputs=[output()],
    )
    return replace(one, **changes)


ITSELF = compared("net@torch", 2e-7, 5e-7, kind="source", sha256=None)
FILE = compared("out/model.onnx@onnxruntime", 3e-7, 1e-6)


def report(*given: Compared, **changes: Any) -> Report:
    arguments: dict[str, Any] = {
        "reference": REFERENCE,
        "compared": given or (ITSELF, FILE),
        "with_own": True,
        "inputs": [InputSpec("x", (2, 3, 12, 12))],
        "command": ["optfuse", "diff", "net.py:build", "my out"],
        "environment": {"cpu_model": "Some CPU", "versions": {"torch": "2.13.0"}},
        "settings": {
            "threads": 1,
            "seed": 3,
            "inputs": "random",
            "data": None,
            "samples": 2,
            "per_layer": False,
            "passes": None,
        },
        "created": datetime(2026, 3, 4, 7, 8, 9, tzinfo=timezone.utc),
        **changes,
    }
    return assemble(**arguments)


def settings(**changes: Any) -> dict[str, Any]:
    return {**report().document["settings"], **changes}


def table(document: Any, title: str, *, brief: bool = True) -> Any:
    (found,) = [
        each for each in kinds.page(document, brief=brief).tables if each.title.startswith(title)
    ]
    return found


# The document


def test_the_document_is_what_its_schema_asks_for_and_can_be_read_back() -> None:
    rows = layers(
        layer("conv_act", 0.98), layer("conv_act_1", math.inf, math.inf), suspect="conv_act_1"
    )
    given = report(
        ITSELF,
        replace(FILE, layers=rows),
        compared("x@tensorrt", math.inf, 0.1, no_layers="it cannot"),
    )
    jsonschema.validate(given.document, schema.json_schema("diff"))
    text = schema.dump(given)
    assert json.loads(text) == json.loads(schema.dump(schema.parse(text)))
    row = given.document["compared"][1]["layers"]["rows"][1]
    assert (row["growth"], row["relative_l2"], row["equals"]) == (None, None, ["relu_2"])
    assert given.document["compared"][2]["samples"][0]["relative_l2"] is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings", "threads"), 0),
        (("settings", "inputs"), "guessed"),
        (("compared", 0, "kind"), "pickle"),
        (("compared", 0, "sha256"), "abc"),
        (("compared", 0, "samples"), []),
        (("compared", 0, "outputs", 0, "mismatched"), -1),
        (("compared", 0, "outputs", 0, "tolerances", "atol"), "0"),
        (("reference",), None),
        (("compared",), []),
    ],
)
def test_what_the_schema_does_not_allow(path: tuple[Any, ...], value: Any) -> None:
    document = json.loads(schema.dump(report()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(OptfuseError):
        schema.parse(json.dumps(document))


def test_others_are_given_as_multiples_of_the_programs_own_error_on_the_same_inputs() -> None:
    samples = [row["samples"] for row in report().document["compared"]]
    assert [each["ratio_to_own"] for each in samples[0]] == [1.0, 1.0]
    # 1e-12: one division.
    assert samples[1][0]["ratio_to_own"] == pytest.approx(1.5, rel=1e-12)
    assert samples[1][1]["ratio_to_own"] == pytest.approx(2.0, rel=1e-12)
    assert samples[1][1]["own_relative_l2"] == 5e-7


@pytest.mark.parametrize("own", [0.0, math.inf])
def test_there_is_no_multiple_of_nothing_or_of_infinity(own: float) -> None:
    document = report(compared("net@torch", own), compared("x@torch", 1e-3)).document
    assert document["compared"][1]["samples"][0]["ratio_to_own"] is None


def test_without_the_program_itself_there_is_no_multiple() -> None:
    document = report(FILE, with_own=False, reference="a.onnx@onnxruntime as it runs").document
    assert document["compared"][0]["samples"][0]["own_relative_l2"] is None
    assert diff.page(document).headline == (
        "out/model.onnx@onnxruntime: relative L2 1.0e-06 from the a.onnx@onnxruntime as it runs",
    )


# What it shows


def test_the_headline_says_how_far_each_is_in_the_worst_sample() -> None:
    assert diff.page(report().document).headline == (
        "net@torch: relative L2 5.0e-07 from the captured program in float64",
        "out/model.onnx@onnxruntime: relative L2 1.0e-06 from the captured program in float64, "
        "2.00x of net@torch's own",
    )


def test_the_headline_names_the_suspect_and_what_it_computes() -> None:
    rows = layers(layer("conv_act", 0.98), layer("conv_act_1", 1234.5), suspect="conv_act_1")
    headline = diff.page(report(ITSELF, replace(FILE, layers=rows)).document).headline
    assert headline[-1] == (
        "out/model.onnx@onnxruntime: the first layer to drift is conv_act_1 (block.conv), which "
        "computes relu_2: it adds 1234 times the usual error"
    )


def test_a_suspect_that_stands_for_itself_with_an_infinite_error() -> None:
    bad = layer("relu_2", math.inf, math.inf, module="")
    rows = layers(bad, suspect="relu_2")
    headline = diff.page(report(ITSELF, replace(FILE, layers=rows)).document).headline
    assert headline[-1].endswith("the first layer to drift is relu_2: it adds an infinite error")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            layers(layer("a", 0.5), layer("b", 1.04), layer("c", None)),
            "no layer is to blame: none adds more than 1.04x the usual error",
        ),
        (layers(), "none of its layers has a counterpart in the reference"),
    ],
)
def test_the_headline_without_a_suspect(rows: LayerDrifts, sentence: str) -> None:
    headline = diff.page(report(ITSELF, replace(FILE, layers=rows)).document).headline
    assert headline[-1] == f"out/model.onnx@onnxruntime: {sentence}"


def test_the_headline_says_why_layers_were_not_compared() -> None:
    headline = diff.page(report(replace(FILE, no_layers="It is an engine")).document).headline
    assert headline[-1].endswith("layers not compared: It is an engine")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": "examples", "samples": 1}, "(the examples)"),
        ({"inputs": "random", "samples": 2}, "(random, seed 3, 2 samples; the worst is shown)"),
        ({"inputs": "file", "data": "my.npz", "samples": 1}, "(from my.npz)"),
    ],
)
def test_the_inputs_and_where_they_came_from(changes: dict[str, Any], words: str) -> None:
    document = report(settings=settings(**changes)).document
    assert diff.page(document).facts == (f"inputs: x 2x3x12x12 float32 {words}",)


def test_distances() -> None:
    found = table(report().document, "Distance")
    assert found.rows == (
        ("net@torch", "5.0e-07", "7.5e-07", "1.000000", "101.2", "100.0%", "1.00x"),
        (
            "out/model.onnx@onnxruntime",
            "1.0e-06",
            "1.5e-06",
            "1.000000",
            "101.2",
            "100.0%",
            "2.00x",
        ),
    )
    assert found.notes == (
        "The reference is the captured program in float64.",
        "Times its own: over the distance of net@torch on the same inputs.",
    )


def test_an_infinite_distance() -> None:
    document = report(compared("x@torch", math.inf), with_own=False).document
    assert table(document, "Distance").rows == (
        ("x@torch", "infinite", "infinite", "0.000000", "-", "100.0%", "-"),
    )
    assert len(table(document, "Distance").notes) == 1


def test_every_sample_stands_in_the_full_report_alone() -> None:
    document = report().document
    assert table(document, "Relative L2 of every", brief=False).rows == (
        ("0", "2.0e-07", "3.0e-07"),
        ("1", "5.0e-07", "1.0e-06"),
    )
    assert "Relative L2" not in " ".join(t.title for t in kinds.page(document, brief=True).tables)
    single = report(compared("x@torch", 1e-7)).document
    assert len(kinds.page(single).tables) == len(kinds.page(single, brief=True).tables)


def test_several_outputs_get_a_table() -> None:
    mask = output(name="mask", dtype="bool", shape=(), mismatched=1200, tolerances=None)
    document = report(replace(FILE, outputs=[output(), mask])).document
    assert table(document, "Outputs").rows == (
        ("out/model.onnx@onnxruntime", "logits", "2x5", "float32", "2.5e-07", "132.0", "-"),
        ("out/model.onnx@onnxruntime", "mask", "scalar", "bool", "2.5e-07", "132.0", "1.20 k"),
    )
    assert [t.title for t in diff.page(report().document, brief=True).tables] == [
        "Distance",
        "Tolerances that would pass",
    ]


def test_tolerances_are_rounded_up() -> None:
    index = output(name="index", dtype="int64", mismatched=3, tolerances=None)
    none = output(
        name="bad",
        tolerances={
            "atol": math.inf,
            "rtol": math.inf,
            "atol_beside_rtol": math.inf,
            "beside_rtol": 1e-5,
        },
    )
    document = report(replace(FILE, outputs=[output(), index, none])).document
    found = table(document, "Tolerances")
    assert [row[1:] for row in found.rows] == [
        ("logits", "3.3e-06", "4.2e-02", "3.1e-06 with 1e-05"),
        ("index", "-", "-", "-"),
        ("bad", "none", "none", "none"),
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "none"),
        (0.0, "0"),
        (1.0, "1.0e+00"),
        (1.01, "1.1e+00"),
        (9.91e-7, "1.0e-06"),
        (9.9e-7, "9.9e-07"),
        (3.2e-6, "3.2e-06"),
        (123.0, "1.3e+02"),
        (5e-324, "4.9e-324"),
    ],
)
def test_a_tolerance_as_written_is_at_least_as_large(number: float | None, text: str) -> None:
    assert at_least(number) == text
    if number:
        assert float(text) >= number


@pytest.mark.parametrize("digits", range(100, 1000, 7))
def test_whatever_its_digits_a_tolerance_is_rounded_up(digits: int) -> None:
    for exponent in (-12, -7, 0, 5):
        number = digits * 10.0**exponent
        # 1.2 %: the second of two digits is at most a tenth of the first, and is raised by one.
        assert number <= float(at_least(number)) <= number * 1.1


def test_integers_booleans_and_what_is_not_finite_are_said() -> None:
    outputs = [
        output(name="index", dtype="int64", mismatched=3, elements=1000, max_abs=5.0),
        output(name="mask", dtype="bool", mismatched=1, elements=12, tolerances=None),
        output(name="same", dtype="int64", mismatched=0, elements=4),
        output(name="bad", nonfinite=2),
        output(name="odd", reference_nonfinite=1),
        output(name="masked", both_nonfinite=6),
    ]
    page = diff.page(report(replace(FILE, name="m@ort", outputs=outputs)).document)
    assert page.warnings == (
        "m@ort, output index: 3 of 1,000 int64 elements differ, by at most 5.00",
        "m@ort, output mask: 1 of 12 bool elements differ",
        "m@ort, output bad: 2 of 10 elements are NaN or infinite where the reference is finite, so "
        "no tolerance passes",
        "m@ort, output odd: 1 of 10 elements are NaN or infinite in the reference and something "
        "else here, so no tolerance passes",
    )
    assert page.facts[1:] == (
        "m@ort, output same: all 4 int64 elements are equal",
        "m@ort, output masked: 6 of 10 elements are the same infinity, or NaN, in both and count "
        "as equal; other tools want equal_nan=True for that",
    )


def many_layers() -> LayerDrifts:
    rows = [layer(f"conv_act_{number}", 1 + number / 1000) for number in range(40)]
    rows[20] = layer("conv_act_20", 5000.0, 0.01)
    return layers(*rows, suspect="conv_act_20")


def test_a_terminal_shows_the_suspect_with_its_neighbours_and_the_worst() -> None:
    document = report(ITSELF, replace(FILE, layers=many_layers())).document
    found = table(document, "Layers of")
    assert [row[0] for row in found.rows] == [
        *("conv_act_18", "conv_act_19", "conv_act_20 (suspect)"),
        *("conv_act_21", "conv_act_22", "conv_act_23"),
        *("conv_act_36", "conv_act_37", "conv_act_38", "conv_act_39"),
    ]
    assert found.rows[2][1:] == ("relu_2", "block.conv", "1.0e-02", "1.0e-07", "5000")
    assert found.notes[0] == "30 more layers are in the report: --export-json."
    assert "above 8 it is suspect" in found.notes[1]


def test_a_file_shows_every_layer_with_all_that_went_into_it() -> None:
    document = report(ITSELF, replace(FILE, layers=many_layers())).document
    found = table(document, "Layers of", brief=False)
    assert len(found.rows) == 40
    assert found.rows[20] == (
        "conv_act_20 (suspect)",
        "conv_act",
        "relu_2",
        "conv2d_2, relu_2",
        "block.conv",
        "1.0e-02",
        "1.0e-07",
        "5000",
    )


def test_layers_that_stand_for_themselves_need_no_mapping() -> None:
    rows = layers(layer("relu_2", 1.0, own_relative_l2=None, growth=None, module=""))
    found = table(report(replace(FILE, layers=rows)).document, "Layers of")
    assert [column.heading for column in found.columns][:2] == ["layer", "module"]
    assert found.rows == (("relu_2", "-", "2.0e-07", "-", "-"),)


def test_an_infinite_error_counts_as_the_worst() -> None:
    rows = [layer(f"l{number}", 1.0) for number in range(30)]
    rows[25] = layer("l25", None, math.inf)
    found = table(report(replace(FILE, layers=layers(*rows))).document, "Layers of")
    assert [row[3] for row in found.rows if row[0] == "l25"] == ["infinite"]


def test_the_explanation_stands_once() -> None:
    both = [replace(each, layers=layers(layer("a", 1.0))) for each in (ITSELF, FILE)]
    tables = [t for t in diff.page(report(*both).document).tables if t.title.startswith("Layers")]
    assert [len(each.notes) for each in tables] == [0, 2]
    assert tables[1].notes[1] == (
        "To look inside, every value is made an output, which keeps onnxruntime from fusing across "
        "it."
    )
    on_torch = replace(ITSELF, layers=replace(layers(layer("a", 1.0)), engine="torch"))
    assert len(table(report(on_torch).document, "Layers of").notes) == 1


def test_without_a_counterpart_there_is_a_sentence() -> None:
    document = report(replace(FILE, layers=layers())).document
    assert table(document, "Layers of").empty == (
        "No layer of out/model.onnx@onnxruntime has a counterpart in the reference."
    )


@pytest.mark.parametrize("width", [80, 120])
def test_it_is_drawn_in_a_terminal_and_in_markdown(width: int) -> None:
    given = report(ITSELF, replace(FILE, layers=many_layers()))
    console = Console(file=io.StringIO(), width=width)
    terminal.render(given, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the first layer to drift is conv_act_20" in text
    assert text.rstrip().endswith("$ optfuse diff net.py:build 'my out'")
    assert max(map(len, text.splitlines())) <= width
    page = markdown.render(given)
    assert page.startswith("# net@torch: relative L2")
    assert "| conv_act_39 |" in page


def test_hostile_names_stay_in_their_cells() -> None:
    name = " ".join(HOSTILE_NAMES)
    rows = layers(
        layer(name, 9.0, kind=name, module=name, equals=(name,), origins=(name,)), suspect=name
    )
    given = report(
        compared(
            f"{name}@torch",
            1e-3,
            layers=rows,
            outputs=[output(name=name, mismatched=1, dtype=name, both_nonfinite=1)],
            no_layers=name,
        ),
        reference=name,
        inputs=[InputSpec(name, (2,))],
        command=["optfuse", *HOSTILE_NAMES],
    )
    page = kinds.page(given.document)
    cells = [cell for t in page.tables for row in t.rows for cell in row]
    texts = [*page.headline, *page.warnings, *page.facts, *cells]
    texts += [note for t in page.tables for note in (t.title, *t.notes)]
    assert all(text.isprintable() for text in texts)
    assert schema.parse(schema.dump(given)).document["reference"] == name
