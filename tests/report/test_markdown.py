"""The report as Markdown: well-formed tables, and names that stay names."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from optfuse.report import markdown
from optfuse.stages import Report
from tests.report.example import empty_report, full_report, hostile_report

CELL_BORDER = re.compile(r"(?<!\\)\|")


@pytest.mark.parametrize("build", [full_report, empty_report, hostile_report])
def test_every_row_of_a_table_has_the_same_number_of_cells(build: Callable[[], Report]) -> None:
    # Outside the code block, where a pipe is a pipe.
    text = re.sub(r"(?s)\n(```+)sh\n.*?\n\1\n", "\n", markdown.render(build()))
    blocks = [block.splitlines() for block in text.split("\n\n")]
    found = [block for block in blocks if block[0].startswith("|")]

    assert len(found) == (0 if build is empty_report else 8)
    for heading, rule, *body in found:
        borders = len(CELL_BORDER.findall(heading))
        assert re.fullmatch(r"\|( -{3}:? \|)+", rule)
        assert {len(CELL_BORDER.findall(line)) for line in (rule, *body)} == {borders}
        assert all(line.startswith("| ") and line.endswith(" |") for line in body)
        assert body


def test_it_reads_as_a_report() -> None:
    text = markdown.render(full_report())

    assert text.startswith("# googlenet: 196 -> 120 operators\n\n- onnxruntime 1.02x [0.99, 1.04] ")
    assert "- WARNING: elide_concat was undone: in float64" in text
    assert "- tensorrt-rtx sm_89 not measured: no GPU\n" in text
    assert "| fold_conv_bn | 57 | 3 | 196 -> 139 | 1.2e-15 | 2.3 |\n" in text
    assert "| onnxruntime | as exported | 1.02x [0.99, 1.04] | und" in text
    assert "```sh\noptfuse optimize models/googlenet.py:build --output 'my folder'\n```" in text
    assert "\n- gpu: -\n" in text
    assert text.endswith("\nWritten 2026-03-04T05:08:09+00:00.\n")


def test_headings_are_those_of_the_tables_that_have_something_to_say() -> None:
    full = re.findall(r"^## (.*)$", markdown.render(full_report()), re.MULTILINE)
    empty = re.findall(r"^## (.*)$", markdown.render(empty_report()), re.MULTILINE)

    assert full == [
        "Passes",
        "Speed-up",
        "Latency",
        "Drift",
        "tensorrt-rtx sm_89",
        "Operators",
        "Refused",
        "Files",
        "Environment",
        "Reproduce",
    ]
    assert empty == ["Passes", "Drift", "Operators", "Refused", "Environment", "Reproduce"]


def test_an_empty_report_says_what_is_missing() -> None:
    text = markdown.render(empty_report())

    assert "## Passes\n\nNo pass was run.\n" in text
    assert "## Drift\n\nDrift was not measured.\n" in text
    assert "## Environment\n\nNothing is known of it.\n" in text


def test_hostile_names_are_escaped() -> None:
    text = markdown.render(hostile_report())

    assert "<script" not in re.sub(r"(?s)```.*?\n```\n", "", text)
    assert "| a\\|b | 3 | 0 |" in text
    assert "| \\`code\\` | 3 | 0 |" in text
    assert "| \\[red]markup[/red] | 3 | 0 |" in text
    assert "| line\\\\nbreak | 3 | 0 |" in text
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("fold_conv_bn", "fold_conv_bn"),
        ("_private_", "\\_private\\_"),
        ("[text](http://x)", "\\[text\\](http://x)"),
        ("see [text](http://x)", "see [text\\](http://x)"),
        ("*bold* ~struck~ $math$", "\\*bold\\* \\~struck\\~ \\$math\\$"),
        ("back\\slash", "back\\\\slash"),
        ("&lt;", "&amp;lt;"),
        ("# heading", "\\# heading"),
        ("> quoted", "\\> quoted"),
        ("- item", "\\- item"),
        ("1. item", "1\\. item"),
    ],
)
def test_what_means_something_to_markdown_gets_a_backslash(name: str, escaped: str) -> None:
    text = markdown.render(full_report(name=name))

    assert text.startswith(f"# {escaped}: 196 -> 120 operators\n")


def test_a_fence_is_longer_than_the_backticks_inside_it() -> None:
    text = markdown.render(full_report(command=["optfuse", "optimize", "a````b"]))

    assert "\n`````sh\noptfuse optimize 'a````b'\n`````\n" in text
