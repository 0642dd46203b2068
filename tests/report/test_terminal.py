"""The report in a terminal, at the widths people have."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from optfuse.report import rows, table, terminal
from optfuse.report.schema import NoiseFloor
from optfuse.stages import Refused, Report, Site, Step
from optfuse.stats import Ratio
from tests.report.example import HOSTILE_NAMES, STEPS, empty_report, full_report, hostile_report


def rendered(report: Report, width: int, color: bool = False) -> str:
    output = io.StringIO()
    console = Console(
        width=width,
        file=output,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
    )
    terminal.render(report, console)
    return output.getvalue()


def tables(report: Report) -> list[table.Table]:
    document = report.document
    return [
        rows.passes(document),
        rows.speedups(document),
        rows.latency(document),
        rows.drift(document),
        *rows.engines(document),
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_and_verdict_is_whole_and_no_line_is_too_long(width: int) -> None:
    report = full_report()
    text = rendered(report, width)

    for each in tables(report):
        for row in each.rows:
            for column, cell in zip(each.columns, row, strict=True):
                if column.number or column.verdict:
                    assert cell in text
    # Each verdict stands in the same line as its own ratio.
    for _, _, ratio, verdict, floor in rows.speedups(report.document).rows:
        assert re.search(rf"{re.escape(ratio)} +{verdict} +{re.escape(floor)}", text)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_longest_names_of_engine_pass_and_variant_are_whole(width: int) -> None:
    text = rendered(full_report(), width)

    assert "eliminate_common_subexpressions" in text
    assert "onnxruntime" in text
    assert re.search(r"onnxruntime +as exported \(again\) +12.25 +12.45", text)


@pytest.mark.parametrize("width", [20, 40])
def test_a_narrow_terminal_breaks_no_number(width: int) -> None:
    text = rendered(full_report(), width)

    for cell in ("1.02x [0.99, 1.04]", "undecided", "196 -> 139", "1.2e-15", "1.000000"):
        assert cell in text


def test_the_sentences_stand_above_the_tables() -> None:
    text = rendered(full_report(), 120)

    assert text.startswith("googlenet: 196 -> 120 operators\nonnxruntime 1.02x [0.99, 1.04] und")
    assert "tensorrt-rtx sm_89 not measured: no GPU\n" in text
    assert "WARNING: elide_concat was undone: in float64" in text


def test_the_command_is_one_line_however_narrow() -> None:
    command = ["optfuse", "optimize", "models/googlenet.py:build", "--output", "x" * 200]
    text = rendered(full_report(command=command), 80)

    assert f"$ optfuse optimize models/googlenet.py:build --output {'x' * 200}\n" in text


def test_only_verdicts_are_colored() -> None:
    text = rendered(full_report(), 120, color=True)

    colored = re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m", text)
    colors = {(code, words.strip()) for code, words in colored if code != "1"}
    assert colors == {("32", "faster"), ("31", "slower"), ("33", "undecided")}
    assert re.sub(r"\x1b\[\d+m", "", text) == rendered(full_report(), 120)


def test_a_run_without_anything_is_shown_in_sentences() -> None:
    text = rendered(empty_report(), 80)

    assert "latency not measured\n" in text
    for sentence in ("No pass was run.", "Drift was not measured.", "No pass refused a place."):
        assert sentence in text
    assert "Speed-up" not in text
    assert "Files" not in text


@pytest.mark.parametrize("width", [20, 80, 120])
def test_hostile_names_neither_move_the_cursor_nor_are_read_as_markup(width: int) -> None:
    text = rendered(hostile_report(), width, color=True)

    # What is left after rich's own styles are taken out is visible text and ends of lines.
    own = re.sub(r"\x1b\[(0|1|3[123])m", "", text)
    assert all(line.isprintable() for line in own.split("\n"))
    assert "[red]markup" in own
    assert "\\x1b[31mred" in own
    assert "faster" in own
    text.encode("utf-8")


def test_explain_lists_every_place_of_a_report_and_of_steps_alike() -> None:
    from_report, from_steps = io.StringIO(), io.StringIO()
    terminal.render_explain(full_report(), Console(width=80, file=from_report))
    terminal.render_explain(STEPS, Console(width=80, file=from_steps))

    text = from_report.getvalue()
    assert text == from_steps.getvalue()
    assert text.count("rewritten conv2d_") == 58
    assert "  refused conv2d_61: the batch norm is in training mode\n" in text
    assert "proof 1.2e-15\n" in text


def test_explain_shows_hostile_names_as_they_are() -> None:
    output = io.StringIO()
    step = Step(
        "pass",
        "fold_conv_bn",
        0.5,
        7,
        6,
        sites=tuple(Site(name) for name in HOSTILE_NAMES),
        refused=tuple(Refused(name, name) for name in HOSTILE_NAMES),
    )
    terminal.render_explain([step], Console(width=80, file=output))

    assert "  rewritten [red]markup[/red]\n" in output.getvalue()
    assert "  refused line\\nbreak: line\\nbreak\n" in output.getvalue()
    assert "\x1b" not in output.getvalue()


def test_explain_without_steps_says_so() -> None:
    output = io.StringIO()
    terminal.render_explain([], Console(width=80, file=output))

    assert output.getvalue() == "No pass was run.\n"


def test_wide_characters_count_as_two_columns() -> None:
    floors = [NoiseFloor("onnxruntime", Ratio(1.002, 0.981, 1.019))]
    steps = [Step("pass", "畳み込み" * 12, 0.5, 1196, 1139, relative_l2=2.5e-16)]
    text = rendered(full_report(steps=steps, noise_floors=floors), 80)

    assert "1196 -> 1139" in text
    assert max(map(cell_len, text.splitlines())) <= 80
