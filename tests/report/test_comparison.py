"""Several reports side by side: like with like, honest changes, and what differs is said."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from optfuse.report import comparison, markdown, terminal
from optfuse.report.entries import change, entries, trends_of
from optfuse.report.table import Table
from optfuse.stages import InputSpec
from optfuse.stats import Ratio
from tests.report.example import empty_report, full_report, hostile_report
from tests.report.pages import bench_report, diff_report, history, illustrated_report

BETTER_THEN_WORSE = (Ratio(1.02, 1.01, 1.03), Ratio(1.05, 1.04, 1.06), Ratio(1.0, 0.99, 1.01))


def tables(documents: comparison.Documents, *, brief: bool = False) -> dict[str, Table]:
    return {table.title: table for table in comparison.page(documents, brief=brief).tables}


def edited(document: Any, **changes: Any) -> Any:
    """The document with some of its parts changed, `part__key` for a key of a part."""
    document = copy.deepcopy(document)
    for path, value in changes.items():
        part, _, key = path.partition("__")
        if key:
            document[part][key] = value
        else:
            document[part] = value
    return document


def row(ratio: float, low: float, high: float, floor: float | None = None) -> dict[str, Any]:
    return {"ratio": ratio, "low": low, "high": high, "noise_floor": floor}


def test_the_headline_says_what_was_gained_and_what_the_last_report_brought() -> None:
    documents = history(BETTER_THEN_WORSE)

    assert comparison.page(documents).headline == (
        "3 reports: 1 model on 2 engines",
        "2 faster, 1 undecided against the export as it comes",
        "most gained: googlenet on onnxruntime 1.05x [1.04, 1.06]",
        "googlenet on onnxruntime: its speed-up is 0.95x [0.94, 0.97] of what it was in report 2, "
        "slower",
    )


def test_one_row_for_each_report_and_engine_with_its_verdict_and_drift() -> None:
    found = tables(history(BETTER_THEN_WORSE))

    assert found["Speed-up"].rows == (
        ("1", "googlenet", "onnxruntime", "1.02x [1.01, 1.03]", "faster", "1.25x"),
        ("2", "googlenet", "onnxruntime", "1.05x [1.04, 1.06]", "faster", "1.25x"),
        ("3", "googlenet", "onnxruntime", "1.00x [0.99, 1.01]", "undecided", "1.25x"),
    )
    assert found["Latency"].rows[1] == (
        *("2", "googlenet", "onnxruntime", "1x3x224x224 float32", "cpu", "2"),
        *("12.00", "11.43"),
    )
    assert found["Reports"].rows[0] == (
        *("1", "day0/report.json", "optimize", "196 -> 120", "2026-03-04 07:08", "0abcdef0"),
    )
    assert found["Commands"].rows[2][1].startswith("optfuse optimize models/googlenet.py:build")
    assert "Commands" not in tables(history(BETTER_THEN_WORSE), brief=True)


def test_a_trend_shows_the_change_of_the_speed_up_with_its_interval() -> None:
    found = tables(history(BETTER_THEN_WORSE))["Trend of googlenet on onnxruntime"]

    assert [column.heading for column in found.columns] == [
        *("report", "created", "commit", "median ms", "times the last", "times as fast"),
        *("change", "verdict"),
    ]
    assert found.rows[0][4:] == ("-", "1.02x [1.01, 1.03]", "-", "-")
    assert found.rows[2] == (
        *("3", "2026-03-06 07:08", "2abcdef0", "12.00", "1.05x", "1.00x [0.99, 1.01]"),
        *("0.95x [0.94, 0.97]", "slower"),
    )


def test_the_order_is_that_of_time_and_not_of_the_command_line() -> None:
    documents = history(BETTER_THEN_WORSE)[::-1]
    found = tables(documents)["Trend of googlenet on onnxruntime"]

    assert [line[0] for line in found.rows] == ["3", "2", "1"]


def test_the_change_of_a_speed_up_is_a_quotient_of_independent_estimates() -> None:
    moved = change(row(1.05, 1.03, 1.08, 1.01), row(1.02, 1.0, 1.05, 1.02))
    assert moved is not None
    ratio, floor = moved
    # By hand: sqrt(log(1.05/1.03)^2 + log(1.05/1.02)^2) below, and likewise above.
    below = math.hypot(math.log(1.05 / 1.03), math.log(1.05 / 1.02))
    above = math.hypot(math.log(1.08 / 1.05), math.log(1.02 / 1.0))

    # Rounding of float64 logarithms only.
    assert ratio.ratio == pytest.approx(1.05 / 1.02, rel=1e-12)
    assert ratio.low == pytest.approx(1.05 / 1.02 * math.exp(-below), rel=1e-12)
    assert ratio.high == pytest.approx(1.05 / 1.02 * math.exp(above), rel=1e-12)
    assert floor == pytest.approx(math.exp(math.hypot(math.log(1.01), math.log(1.02))), rel=1e-12)


def test_its_interval_covers_the_true_change_as_often_as_it_says() -> None:
    """Of 4000 simulated pairs with intervals of 95 %; 94 to 96 is three standard errors."""
    random = np.random.default_rng(0)
    sizes = np.array([0.004, 0.02])
    drawn = random.normal([0.03, 0.01], sizes, (4000, 2))
    covered = 0
    for now, before in drawn:
        rows = [
            row(*(math.exp(middle + z * size) for z in (0.0, -1.96, 1.96)))
            for middle, size in zip((now, before), sizes, strict=True)
        ]
        moved = change(rows[0], rows[1])
        assert moved is not None
        covered += moved[0].low <= math.exp(0.02) <= moved[0].high
    assert 0.94 <= covered / 4000 <= 0.96


@pytest.mark.parametrize("key", ["ratio", "low", "high"])
def test_without_an_interval_there_is_no_change(key: str) -> None:
    unknown = {**row(1.05, 1.03, 1.08), key: None}

    assert change(unknown, row(1.0, 0.9, 1.1)) is None
    assert change(row(1.0, 0.9, 1.1), unknown) is None


def test_numbers_from_a_file_may_be_anything() -> None:
    moved = change(row(1e300, 1e290, 1e308), row(1e-300, 1e-308, 1e-290))

    assert moved is not None
    assert all(map(math.isfinite, (moved[0].ratio, moved[0].low, moved[0].high)))


@pytest.mark.parametrize(
    ("changes", "aspect"),
    [
        (
            {"environment__cpu_model": "Another CPU"},
            "machine (reports 1 and 2: Some CPU; report 3: Another CPU)",
        ),
        ({"settings__threads": 4}, "CPU threads (reports 1 and 2: 2; report 3: 4)"),
        (
            {"program__inputs": [{"name": "x", "shape": [8, 3, 224, 224], "dtype": "float32"}]},
            "inputs (reports 1 and 2: 1x3x224x224 float32; report 3: 8x3x224x224 float32)",
        ),
    ],
)
def test_what_is_not_alike_is_in_no_trend_and_the_page_says_why(
    changes: dict[str, Any], aspect: str
) -> None:
    documents = history(BETTER_THEN_WORSE)
    documents[2] = ("other", edited(documents[2][1], **changes))
    page = comparison.page(documents)

    [trend] = trends_of(entries(documents))
    assert [each.number for each in trend] == [1, 2]
    assert page.warnings == (
        "googlenet on onnxruntime: not all latencies of these reports can be compared, they "
        f"differ in {aspect}",
    )


def test_another_device_is_not_alike_either() -> None:
    documents = history(BETTER_THEN_WORSE[:2])
    other = copy.deepcopy(documents[1][1])
    for each in other["latency"]:
        each["device"] = "NVIDIA H200"
    documents[1] = ("other", other)

    assert trends_of(entries(documents)) == []
    assert "device (report 1: cpu; report 2: NVIDIA H200)" in comparison.page(documents).warnings[0]


def test_another_version_or_pass_is_in_the_trend_and_named() -> None:
    documents = history(BETTER_THEN_WORSE)
    versions = {"torch": "2.13.0", "onnxruntime": "1.32.0"}
    documents[1] = (
        "newer",
        edited(
            documents[1][1],
            environment__versions=versions,
            settings__passes=["fold_conv_bn", "elide_concat"],
        ),
    )
    found = tables(documents)["Trend of googlenet on onnxruntime"]

    assert found.notes[1:] == (
        "Not the same in all of them: onnxruntime (reports 1 and 3: 1.31.1; report 2: 1.32.0).",
        "Not the same in all of them: passes (reports 1 and 3: without; report 2: elide_concat).",
    )


def test_two_models_are_two_groups_and_no_trend() -> None:
    documents = [
        ("a", full_report(name="a").document),
        ("b", full_report(name="b").document),
    ]
    page = comparison.page(documents)

    assert page.headline[0] == "2 reports: 2 models on 2 engines"
    assert not [table for table in page.tables if table.title.startswith("Trend")]
    assert page.warnings == ()


def test_trends_that_share_a_name_get_more_words() -> None:
    documents = history(BETTER_THEN_WORSE[:2]) + history(
        BETTER_THEN_WORSE[:2], inputs=[InputSpec("x", (8, 3, 224, 224))]
    )
    titles = [title for title in tables(documents) if title.startswith("Trend")]

    assert titles == [
        "Trend of googlenet on onnxruntime, 1x3x224x224 float32, reports 1 and 2",
        "Trend of googlenet on onnxruntime, 8x3x224x224 float32, reports 3 and 4",
    ]
    assert [each.section for each in comparison.illustrations(documents)][1:] == titles


def test_benches_are_compared_contender_for_contender_and_batch_for_batch() -> None:
    documents = [("a", bench_report().document), ("b", bench_report().document)]
    page = comparison.page(documents)
    found = tables(documents)

    assert page.headline[0] == "2 reports: 3 models on 2 engines"
    assert page.headline[1] == "8 faster against net@torch"
    assert page.warnings == ()
    assert len(trends_of(entries(documents))) == 6
    assert found["Latency"].rows[0][:4] == (
        *("1", "net.onnx@onnxruntime", "onnxruntime", "1x3x224x224 float32"),
    )
    assert [column.heading for column in found["Latency"].columns][-2:] == [
        "against ms",
        "itself ms",
    ]


def test_a_diff_is_listed_and_not_compared() -> None:
    page = comparison.page([("a", full_report().document), ("d", diff_report().document)])

    assert page.facts == ("report 2 is a diff and has no latency to compare: see it alone",)
    assert [line[2] for line in page.tables[2].rows] == ["optimize", "diff"]


def test_reports_without_any_latency_are_shown_in_sentences() -> None:
    documents = [("a", empty_report().document), ("b", empty_report().document)]
    page = comparison.page(documents)

    assert page.headline == ("2 reports",)
    assert page.tables[0].empty == "No report compares latencies."
    assert comparison.illustrations(documents) == []


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_it_within_its_width(width: int) -> None:
    output = io.StringIO()
    page = comparison.page(history(BETTER_THEN_WORSE), brief=True)
    terminal.render_page(page, Console(width=width, file=output))
    lines = output.getvalue().splitlines()

    assert lines[0] == "3 reports: 1 model on 2 engines"
    assert max(map(len, lines)) <= width
    assert any("0.95x [0.94, 0.97]  slower" in line for line in lines)


def test_markdown_shows_it() -> None:
    text = markdown.render_page(comparison.page(history(BETTER_THEN_WORSE)))

    assert text.startswith("# 3 reports: 1 model on 2 engines\n\n- 2 faster, 1 undecided")
    assert "## Trend of googlenet on onnxruntime\n\n| report | created | commit |" in text
    assert "| 3 | googlenet | onnxruntime | 1.00x [0.99, 1.01] | undecided | 1.25x |" in text


def test_hostile_names_neither_break_a_row_nor_a_plot() -> None:
    documents = [
        ("line\nbreak", hostile_report().document),
        ("\x1b[31m", edited(hostile_report().document, environment__commit="<b>\x07")),
        ("c", illustrated_report().document),
    ]
    page = comparison.page(documents)
    cells = [cell for table in page.tables for line in table.rows for cell in line]

    for text in (*page.headline, *page.warnings, *page.facts, *cells):
        assert text.isprintable()
    for drawn in comparison.illustrations(documents):
        assert "<script" not in drawn.wide
        assert "\x07" not in drawn.wide
