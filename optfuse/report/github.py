"""A gate as GitHub Actions shows it: annotations beside the run, and a summary of the step.

The commands are those of GitHub's documentation, "Workflow commands for GitHub Actions". A runner
takes any line of standard output that begins with `::` for a command, whoever wrote it, so what
else is printed stands between `stopped` and `resumed`.
"""

from __future__ import annotations

from pathlib import Path

from optfuse.files import writing
from optfuse.report import markdown, verdicts
from optfuse.report.verdicts import Criterion, Gate

_DATA = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_PROPERTY = _DATA | str.maketrans({":": "%3A", ",": "%2C"})


def commands(gate: Gate) -> list[str]:
    """One annotation for each criterion that did not pass: an error where it fails the gate, else a
    warning."""
    failing = (*gate.failed, *gate.unchecked)
    return [
        _command("error" if each in failing else "warning", each)
        for each in gate.criteria
        if each.outcome != "passed"
    ]


def stopped(token: str) -> str:
    """The line from which on the runner looks for no command but `resumed(token)`.

    Args:
        token: letters and digits that nobody can foresee.
    """
    return f"::stop-commands::{token}"


def resumed(token: str) -> str:
    """The line that undoes `stopped`."""
    return f"::{token}::"


def append_summary(gate: Gate, path: Path) -> None:
    """Add the gate's page to the step's summary.

    Args:
        gate: the outcome.
        path: the file that GITHUB_STEP_SUMMARY names; other commands of the step write to it too.

    Raises:
        OutputError: it cannot be written.
    """
    text = markdown.render_page(verdicts.page(gate))
    with writing("The step summary", path), path.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def _command(level: str, each: Criterion) -> str:
    title = f"optfuse check {each.title}: {each.outcome}".translate(_PROPERTY)
    message = f"{each.sentence}. {each.next_step}.".translate(_DATA)
    return f"::{level} title={title}::{message}"
