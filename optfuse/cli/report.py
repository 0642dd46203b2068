"""`optfuse report`: what was measured before, shown again: one report, or several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from optfuse.cli.application import app, reporting
from optfuse.cli.console import stdout
from optfuse.cli.options import DebugOption

if TYPE_CHECKING:
    from optfuse.stages import Report

Found: TypeAlias = "list[tuple[str, Report]]"
"""Reports with the paths they were read from."""


@app.command()
@reporting
def report(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...",
            help="A report.json, or the folder that holds it. Several are compared: models, "
            "engines and commits side by side, and the same ones over time.",
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one HTML page that needs nothing but itself."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")
    ] = None,
    debug: DebugOption = False,  # noqa: ARG001 read by reporting
) -> None:
    """Show one report or compare several: in the terminal, or as files."""
    from optfuse.files import write_text
    from optfuse.report.reading import read
    from optfuse.report.table import printable

    found = [(str(path), read(path)) for path in reports]
    for file, render in ((html, _html), (markdown, _markdown)):
        if file:
            write_text(file, render(found))
            typer.echo(printable(str(file)))
    if not html and not markdown:
        _print(found)


def _html(found: Found) -> str:
    from optfuse.report import document

    if len(found) == 1:
        return document.render(found[0][1])
    return document.render_comparison([(path, each.document) for path, each in found])


def _markdown(found: Found) -> str:
    from optfuse.report import comparison, markdown

    if len(found) == 1:
        return markdown.render(found[0][1])
    return markdown.render_page(comparison.page([(path, each.document) for path, each in found]))


def _print(found: Found) -> None:
    from optfuse.report import comparison, terminal

    if len(found) == 1:
        terminal.render(found[0][1], stdout())
        return
    documents = [(path, each.document) for path, each in found]
    terminal.render_page(comparison.page(documents, brief=True), stdout())
