"""A gate on GitHub: commands that a runner reads as they were meant, and a summary."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from optfuse.errors import OutputError
from optfuse.report import github
from optfuse.report.verdicts import Gate
from tests.report.example import HOSTILE_NAMES
from tests.report.test_verdicts import DRIFT, criteria


def test_failures_are_errors_and_doubts_are_warnings() -> None:
    gate = Gate(
        "net",
        criteria(drift="failed", speed_a="undecided", speed_b="passed", layers="not compared"),
    )
    assert github.commands(gate) == [
        "::error title=optfuse check --drift on drift%3A failed::drift is failed. Find the layer.",
        "::warning title=optfuse check --speed on speed_a%3A undecided::speed_a is undecided. "
        "Find the layer.",
        "::error title=optfuse check --layers on layers%3A not compared::layers is not compared. "
        "Find the layer.",
    ]
    strict = github.commands(replace(gate, strict=True))
    assert [line.split()[0] for line in strict] == ["::error"] * 3


def test_a_gate_that_passes_has_no_annotation() -> None:
    assert github.commands(Gate("net", criteria(drift="passed"))) == []


def read_back(line: str) -> tuple[str, str, str]:
    """Level, title and message as the runner takes them out of a line."""
    found = re.fullmatch(r"::(\w+) title=([^:,]*)::(.*)", line)
    assert found, line
    texts = []
    for text in found.groups()[1:]:
        for escape, character in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n")):
            text = text.replace(escape, character)
        texts.append(text.replace("%25", "%"))
    return found[1], texts[0], texts[1]


@pytest.mark.parametrize(
    "name", [*HOSTILE_NAMES, "::error::x", "a::b", "50%", "%0A", "a,file=b", "x\r\n::add-mask::y"]
)
def test_a_name_never_ends_its_annotation(name: str) -> None:
    failed = replace(DRIFT, on=name, sentence=f"{name}: the drift", outcome="failed")
    [line] = github.commands(Gate("net", (failed,)))
    assert len(line.splitlines()) == 1
    assert read_back(line) == (
        "error",
        f"optfuse check --max-drift on {name}: failed",
        f"{name}: the drift. Find the layer.",
    )


def test_commands_are_stopped_until_the_same_token() -> None:
    assert github.stopped("a1b2") == "::stop-commands::a1b2"
    assert github.resumed("a1b2") == "::a1b2::"


def test_the_summary_is_added_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("# An earlier step\n", encoding="utf-8")
    github.append_summary(Gate("net", criteria(drift="failed", speed="passed")), path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# An earlier step\n# net: failed (1 failed, 1 passed)\n")
    assert "\n| drift | drift | &lt;= 1e-05 | 3.1e-02 | failed |\n" in text
    assert "\ndrift is failed.\n" in text


def test_a_summary_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="The step summary cannot be written to"):
        github.append_summary(Gate("net", criteria(drift="failed")), tmp_path / "gone" / "x.md")
