"""`optfuse check`: the gate for CI."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optfuse.cli.application import app, fail, reporting
from optfuse.cli.console import stdout
from optfuse.cli.options import DebugOption, split

if TYPE_CHECKING:
    from optfuse.report.verdicts import Gate


@app.command()
@reporting
def check(
    report: Annotated[
        Path,
        typer.Argument(
            metavar="REPORT", help="The report.json of 'optfuse optimize', or the folder of it."
        ),
    ],
    max_drift: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="How far the outputs may be from the float64 reference, relative L2."
        ),
    ] = None,
    max_drift_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="The same, as a multiple of the distance of the export as it comes."
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            metavar="SHARE",
            help="In how many of the rows the largest output has to be the reference's, 0 to 1.",
        ),
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="How many times as fast as the export as it comes it has to be."
        ),
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="How many times as long as in the baseline report a run may take."
        ),
    ] = None,
    max_operators: Annotated[
        int | None, typer.Option(metavar="N", help="How many operators the program may have.")
    ] = None,
    max_engine_layers: Annotated[
        int | None, typer.Option(metavar="N", help="How many layers each built engine may have.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="REPORT", help="The earlier report that --max-slowdown is about."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An engine to look at. Repeat it for several.",
            show_default="every engine of the report",
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict",
            help="Fail where the verdict is 'undecided' or 'not compared' too.",
            show_default="no",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TOML file with a table tool.optfuse.check of limits. Options win over it.",
            show_default="pyproject.toml, where it is here",
        ),
    ] = None,
    github: Annotated[
        bool,
        typer.Option("--github", help="Print annotations for GitHub Actions, and write a summary."),
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the verdicts as JUnit XML.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but what fails.")] = False,
    debug: DebugOption = False,
) -> None:
    """Hold a report against limits, and exit with 1 where one of them does not hold."""
    from optfuse import gate as gating
    from optfuse.files import write_bytes
    from optfuse.limits import Limits, settings
    from optfuse.report import junit as as_junit
    from optfuse.report.reading import read

    limits = Limits(
        max_drift=max_drift,
        max_drift_ratio=max_drift_ratio,
        min_top1=min_top1,
        min_speedup=min_speedup,
        max_slowdown=max_slowdown,
        max_operators=max_operators,
        max_engine_layers=max_engine_layers,
    )
    asked = settings(limits, baseline=baseline, engines=split(engine), strict=strict, file=config)
    gate = gating.check(
        read(report),
        asked.limits,
        baseline=None if asked.baseline is None else read(asked.baseline),
        engines=asked.engines,
        strict=asked.strict,
    )
    if junit:
        write_bytes(junit, as_junit.render(gate))
    found = gating.failures(gate)
    if github:
        _to_github(gate, quiet)
    else:
        if not quiet:
            _print(gate)
        for failure in found:
            fail(failure, debug)
    if found:
        raise typer.Exit(found[0].exit_code)


def _print(gate: Gate) -> None:
    from optfuse.report import terminal, verdicts

    terminal.render_page(verdicts.page(gate, brief=True), stdout())


def _to_github(gate: Gate, quiet: bool) -> None:
    from optfuse.report import github

    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        github.append_summary(gate, Path(summary))
    if not quiet:
        token = secrets.token_hex(16)
        typer.echo(github.stopped(token))
        _print(gate)
        typer.echo(github.resumed(token))
    for line in github.commands(gate):
        typer.echo(line)
