"""What the tables say, cell for cell."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optfuse.report import rows, table
from optfuse.report.schema import Comparison, NotMeasured
from optfuse.stages import Refused, Site, Step
from optfuse.stats import Ratio
from tests.report.example import STEPS, empty_report, full_report, hostile_report
from tests.report.pages import illustrated_report, layers


def test_the_headline_names_counts_ratio_interval_verdict_and_drift() -> None:
    assert rows.headline(full_report().document) == [
        "googlenet: 196 -> 120 operators",
        "onnxruntime 1.02x [0.99, 1.04] undecided against the export as it comes; "
        "drift 1.25x of the export's own",
        "torch drift 2.9e-07 (the export's own is zero or unknown)",
        "tensorrt-rtx sm_89 not measured: no GPU",
    ]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(1.304, 1.271, 1.332), "1.30x [1.27, 1.33] faster than the export as it comes"),
        (Ratio(0.871, 0.852, 0.893), "0.87x [0.85, 0.89] slower than the export as it comes"),
        # A narrow interval gets a third decimal, or the two ends would look like 1.03.
        (Ratio(1.0310, 1.0261, 1.0349), "1.031x [1.026, 1.035] faster than the export"),
    ],
)
def test_the_headline_says_faster_and_slower(ratio: Ratio, words: str) -> None:
    comparison = Comparison("onnxruntime", "optimized", "onnxruntime", "baseline", ratio)
    document = full_report(comparisons=[comparison]).document

    assert words in rows.headline(document)[1]


def test_the_headline_of_a_run_without_latency_says_so() -> None:
    assert rows.headline(empty_report().document) == [
        "nothing: 1 -> 1 operators",
        "latency not measured",
    ]


def test_missing_latencies_are_named_once_with_the_reason_as_given() -> None:
    missing = [
        NotMeasured("tensorrt", None, None, "not measured: no GPU"),
        NotMeasured("torch", "optimized", None, "it ran out of memory"),
    ]
    document = full_report(not_measured=missing, engine_reports=[]).document

    assert rows.not_measured(document) == [
        "tensorrt not measured: no GPU",
        "torch optimized not measured: it ran out of memory",
    ]


def test_warnings_name_undone_passes_and_values_that_are_not_finite() -> None:
    undone = rows.warnings(full_report().document)
    nonfinite = rows.warnings(hostile_report().document)

    assert undone == [f"elide_concat was undone: {STEPS[2].undone}"]
    assert nonfinite[-1].endswith(
        "as exported gives 7 values that are not finite where the reference is"
    )


def test_program_lines_give_inputs_parameters_and_flops() -> None:
    assert rows.program_lines(full_report().document) == [
        "inputs: x 1x3x224x224 float32",
        "parameters 7.00 M -> 6.99 M; FLOPs not counted -> 3.00 G",
    ]


def test_passes() -> None:
    table = rows.passes(full_report().document)

    assert [column.heading for column in table.columns] == [
        "pass",
        "rewritten",
        "refused",
        "operators",
        "proof rel. L2",
        "time s",
    ]
    # The second fold_conv_bn found nothing more and is not shown.
    assert table.rows == (
        ("torch.export", "-", "-", "196 -> 196", "-", "1.3"),
        ("fold_conv_bn", "57", "3", "196 -> 139", "1.2e-15", "2.3"),
        ("elide_concat", "1 undone", "0", "139 -> 139", "3.1e-02", "0.50"),
        ("combine_parallel_convs", "1", "0", "139 -> 120", "-", "0.25"),
        ("eliminate_common_subexpressions", "0", "0", "120 -> 120", "-", "12"),
    )


def test_a_pass_that_finds_more_the_second_time_is_shown_twice() -> None:
    again = Step("pass", "fold_conv_bn", 0.25, 120, 118, sites=(STEPS[1].sites[0],))
    table = rows.passes(full_report(steps=[*STEPS, again]).document)

    assert table.rows[-1] == ("fold_conv_bn", "1", "0", "120 -> 118", "-", "0.25")


def test_latency() -> None:
    table = rows.latency(full_report().document)

    assert table.rows[2] == (
        "onnxruntime",
        "as exported (again)",
        "12.25",
        "12.45",
        "12.47",
        "12.49",
        "81.63",
    )
    assert table.notes == ("Ran torch on cpu, onnxruntime on cpu, 5 runs of each.",)


def test_speedups() -> None:
    table = rows.speedups(full_report().document)

    assert table.rows == (
        ("onnxruntime", "as exported", "1.02x [0.99, 1.04]", "undecided", "1.02x"),
        ("onnxruntime", "torch as exported", "2.62x [2.51, 2.72]", "faster", "1.02x"),
        ("onnxruntime as exported", "torch optimized", "0.87x [0.85, 0.89]", "slower", "1.02x"),
    )


def test_a_slower_result_says_what_to_try() -> None:
    slower = Ratio(0.97, 0.96, 0.98)
    comparison = Comparison("onnxruntime", "optimized", "onnxruntime", "baseline", slower)
    combined = Step("pass", "combine_parallel_convs", 0.1, 9, 8, sites=(Site("conv2d"),))

    def notes(step: Step) -> tuple[str, ...]:
        report = full_report(comparisons=[comparison], steps=[step])
        return rows.speedups(report.document).notes[1:]

    assert notes(combined) == (
        "Slower on onnxruntime: some engines pay more for the split behind combined convolutions "
        "than they gain. Try --passes all,-combine_parallel_convs.",
    )
    assert notes(replace(combined, sites=())) == ()
    assert notes(replace(combined, name="fold_conv_bn")) == ()


def test_a_speedup_without_a_control_shows_no_noise_floor() -> None:
    table = rows.speedups(full_report(noise_floors=[]).document)

    assert table.rows[0][-1] == "-"


def test_drift() -> None:
    table = rows.drift(full_report().document)

    assert table.rows[1] == (
        "onnxruntime",
        "optimized",
        "4.0e-07",
        "6.0e-07",
        "1.000000",
        "129.9",
        "100.0%",
        "1.25x",
    )
    assert table.rows[2][-1] == "-"
    assert table.notes == ("The reference is the float64 program.",)


def test_drift_that_is_not_finite_has_no_number() -> None:
    assert rows.drift(hostile_report().document).rows[0][2:4] == ("-", "-")


def test_engines_stand_side_by_side() -> None:
    (table,) = rows.engines(full_report().document)

    assert table.title == "tensorrt-rtx sm_89"
    assert [column.heading for column in table.columns] == ["", "as exported", "optimized"]
    assert table.rows == (
        ("layers", "57", "40"),
        ("  correlation", "57", "39"),
        ("  slice", "0", "1"),
        ("activations MB", "35.4", "12.8"),
        ("weights MB", "-", "-"),
        ("engine MB", "14.0", "14.0"),
        ("build seconds", "0.64", "0.64"),
    )


def test_operators_that_did_not_change_are_left_out() -> None:
    assert rows.operators(full_report().document).rows == (
        ("batch_norm", "57", "0"),
        ("conv2d", "57", "38"),
        ("relu", "57", "0"),
        ("conv_act", "0", "57"),
    )


def test_refusals_are_grouped_by_reason_and_counted_once_a_place() -> None:
    again = Step("pass", "fold_conv_bn", 0.5, 120, 120, refused=STEPS[1].refused)
    table = rows.refusals(full_report(steps=[*STEPS, again]).document)

    assert table.rows == (
        ("fold_conv_bn", "the convolution's output has 2 users", "2", "conv2d_60, conv2d_62"),
        ("fold_conv_bn", "the batch norm is in training mode", "1", "conv2d_61"),
    )


def test_refusals_show_the_first_places_and_count_the_groups_left_out() -> None:
    many = tuple(Refused(f"cat_{i}", "it is dynamic") for i in range(9))
    few = tuple(Refused(f"add_{i}", f"reason {i}") for i in range(3))
    steps = [Step("pass", "elide_concat", 0.5, 7, 7, refused=few + many)]
    document = full_report(steps=steps).document

    table = rows.refusals(document, limit=1)
    assert table.rows == (("elide_concat", "it is dynamic", "9", "cat_0, cat_1, cat_2, ..."),)
    assert table.notes == ("3 more reasons: 'optfuse explain --by pass' shows them all.",)
    assert rows.refusals(document, limit=3).notes == (
        "1 more reason: 'optfuse explain --by pass' shows them all.",
    )


def test_artifacts() -> None:
    assert rows.artifacts(full_report().document).rows == (
        ("baseline.onnx", "onnx", "28.0", "abababababab"),
        ("engines/model.sm_89.engine", "engine", "14.0", "0c0c0c0c0c0c"),
    )


def test_environment() -> None:
    document = full_report().document

    assert rows.machine(document) == (
        "Some CPU @ 2.50 GHz, CPU threads: 2, torch 2.13.0, tensorrt_rtx 1.7.1"
    )
    assert rows.environment(document) == [
        "cpu model: Some CPU @ 2.50 GHz",
        "memory: 8.35 GB",
        "load average: 0.25, 0.5, 0.75",
        "gpu: -",
        "versions: torch 2.13.0, tensorrt_rtx 1.7.1",
    ]
    gpu = full_report(environment={"gpu": {"name": "NVIDIA H200", "driver": "580.1"}}).document
    assert rows.machine(gpu) == "NVIDIA H200, CPU threads: 2"


def test_the_explanation_lists_every_place() -> None:
    lines = rows.explanation(full_report().document["steps"])

    assert lines[0] == (
        0,
        "fold_conv_bn: 57 rewritten, 3 refused, 196 -> 139 operators, proof 1.2e-15",
    )
    assert (1, "rewritten conv2d_56: folded batch_norm_56") in lines
    assert (1, "refused conv2d_61: the batch norm is in training mode") in lines
    assert (0, "elide_concat: 1 undone, 0 refused, 139 -> 139 operators, proof 3.1e-02") in lines
    assert (1, f"undone: {STEPS[2].undone}") in lines
    assert (1, "rewritten cat_1") in lines


def test_empty_tables_say_what_is_missing() -> None:
    document = empty_report().document

    assert rows.passes(document).empty == "No pass was run."
    assert rows.drift(document).empty == "Drift was not measured."
    assert rows.refusals(document).empty == "No pass refused a place."
    assert rows.operators(document).empty == "No operator count changed."
    for each in (rows.speedups, rows.latency, rows.artifacts):
        assert (each(document).rows, each(document).notes) == ((), ())
    assert rows.engines(document) == []
    assert rows.program_lines(document)[0] == "inputs: none"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain conv2d_1 (naïve.層)", "plain conv2d_1 (naïve.層)"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("right\u202eto left", "right\\u202eto left"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_only_visible_characters_leave(text: str, shown: str) -> None:
    assert table.printable(text) == shown


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (12.3456, 4, "12.35"),
        (0.0012345, 4, "0.001234"),
        (123456.7, 4, "123457"),
        (9.9996, 4, "10.00"),
        (0.64, 2, "0.64"),
        (0.0, 3, "0"),
        (None, 3, "-"),
    ],
)
def test_significant_digits(number: float | None, digits: int, text: str) -> None:
    assert table.significant(number, digits) == text


def test_counts_distances_and_sizes() -> None:
    assert [table.count(n) for n in (999, 6_998_552, 3_005_000_000, None)] == [
        "999",
        "7.00 M",
        "3.00 G",
        "not counted",
    ]
    assert [table.distance(n) for n in (1.24e-15, 0.0, None)] == ["1.2e-15", "0", "-"]
    assert [table.megabytes(n) for n in (28_012_345, 12, None)] == ["28.0", "<0.001", "-"]


def test_ablation_shows_each_choice_of_passes_for_each_engine() -> None:
    [found] = rows.ablation(illustrated_report().document)

    assert found.title == "What each pass earned on onnxruntime"
    assert [column.heading for column in found.columns] == [
        *("passes", "operators", "times as fast", "verdict", "drift rel. L2", "median ms"),
        "same program as",
    ]
    assert found.rows[:4] == (
        ("only fold_conv_bn", "139", "1.020x [1.016, 1.024]", "faster", "-", "11.89", "-"),
        ("all but fold_conv_bn", "139", "0.970x [0.966, 0.974]", "slower", "-", "12.50", "-"),
        ("up to fold_conv_bn", "139", "1.020x [1.016, 1.024]", "faster", "-", "11.89", "-"),
        (
            *("only elide_concat", "139", "as exported", "-", "-", "12.12"),
            "as exported",
        ),
    )


def test_a_terminal_shows_an_ablation_without_what_is_for_a_plot() -> None:
    [found] = rows.ablation(illustrated_report().document, brief=True)

    assert len(found.columns) == 5
    assert [row[0] for row in found.rows] == [
        *("only fold_conv_bn", "all but fold_conv_bn", "only elide_concat"),
        *("all but elide_concat", "only combine_parallel_convs", "all but combine_parallel_convs"),
    ]


def test_layers_are_all_there_in_the_order_they_run() -> None:
    found = rows.layers(illustrated_report().document["layers"])

    assert len(found.rows) == 40
    assert found.rows[2] == ("conv_act_2", "conv_act", "inception3a.branch3.conv", "0", "0", "-")
    assert found.rows[7] == (
        *("conv_act_7 (suspect)", "conv_act", "inception3a.branch4.conv", "2.7e-05", "3.4e-07"),
        "80.0",
    )
    assert found.rows[39][3:] == ("infinite", "-", "-")
    assert found.notes == (
        "conv_act_7 of inception3a.branch4.conv is the first layer to drift: it adds 80.0 times "
        "the usual error.",
        "On torch; the reference is the captured program in float64. A layer that adds more than "
        "10 times the usual error is suspect.",
    )


def test_a_terminal_shows_the_suspect_and_the_worst_layers() -> None:
    document = illustrated_report().document
    brief = {each.title: each for each in rows.page(document, brief=True).tables}[rows.LAYERS]

    assert [row[0] for row in brief.rows] == [
        *("conv_act_7 (suspect)", "conv_act_36", "conv_act_37", "conv_act_38", "conv_act_39"),
    ]
    assert brief.notes[-1] == "35 layers that add less are not shown."
    # A suspect that is not among the worst is shown all the same.
    found = {**document["layers"], "suspect": "conv_act_0"}
    assert [row[0] for row in rows.layers(found, 1).rows] == ["conv_act_0 (suspect)", "conv_act_39"]


def test_a_report_without_layers_or_ablation_has_no_such_table() -> None:
    titles = [each.title for each in rows.page(full_report().document).tables]

    assert rows.LAYERS not in titles
    assert not [title for title in titles if title.startswith("What each pass")]


def test_layers_that_could_not_be_compared_are_said_so() -> None:
    found = rows.page(illustrated_report(layers=layers(["x"], None)).document)
    assert "No layer adds more than 10 times the usual error." in {
        note for each in found.tables for note in each.notes
    }
    document = illustrated_report().document
    none = rows.layers({**document["layers"], "rows": [], "suspect": None})
    assert (none.rows, none.empty) == ((), "No layer could be compared.")
