"""`optfuse bench`: latencies side by side."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optfuse.cli.application import app, fail, reporting
from optfuse.cli.console import progress, stdout
from optfuse.cli.options import (
    DebugOption,
    InputOption,
    JsonOption,
    QuietOption,
    SeedOption,
    ThreadsOption,
    TrustOption,
    WeightsOption,
    sizes,
)

if TYPE_CHECKING:
    from optfuse.stages import Report


@app.command()
@reporting
def bench(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT[@ENGINE]...",
            help="What is measured: a model source, an .onnx file, an engine file, or a folder "
            "that 'optfuse optimize' wrote, each with the engine that runs it where it is not "
            "the usual one. The others are compared with the first.",
        ),
    ],
    weights: WeightsOption = None,
    inputs: InputOption = None,
    batch: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Sizes of the inputs' first dimension, each measured in a run of its own.",
            show_default="as the inputs are",
        ),
    ] = "",
    duration: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="How long to measure each batch.")
    ] = 15.0,
    warmup: Annotated[
        float, typer.Option(min=0, metavar="MS", help="How long each is warmed up at least.")
    ] = 200.0,
    blocks: Annotated[
        int | None,
        typer.Option(
            min=8, help="How many interleaved blocks.", show_default="10 to 40, as time allows"
        ),
    ] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    isolated: Annotated[
        bool,
        typer.Option(
            "--isolated/--in-process",
            help="A fresh process for each, or all of them interleaved in one.",
        ),
    ] = False,
    export_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report, raw samples included.")
    ] = None,
    export_markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write its tables as Markdown.")
    ] = None,
    export_csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write its statistics, a line for each.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    trust: TrustOption = False,
) -> None:
    """Measure models, ONNX files and engines against each other, and report their latencies."""
    batches = sizes("--batch", batch)

    def keep(report: Report) -> None:
        _write(report, export_json, export_markdown, export_csv)

    # A model may print while it is loaded or run; standard output is the report's alone.
    with contextlib.redirect_stdout(sys.stderr), progress(shown=not quiet) as notify:
        from optfuse import bench as measuring
        from optfuse.environment import available_threads
        from optfuse.files import cache_folder
        from optfuse.inputs import parse_input
        from optfuse.measure import Schedule

        outcome = measuring.bench(
            measuring.BenchRequest(
                subjects=tuple(subjects),
                weights=weights,
                inputs=tuple(parse_input(each) for each in inputs or ()),
                seed=seed,
                trust=trust,
                batches=batches,
                threads=threads or available_threads(),
                schedule=Schedule.lasting(duration, warmup_ms=warmup, blocks=blocks),
                isolated=isolated,
                cache=cache_folder(),
                command=("optfuse", *sys.argv[1:]),
            ),
            notify,
            keep,
        )
    if json:
        from optfuse.report import schema

        typer.echo(schema.dump(outcome.report), nl=False)
    elif not quiet:
        from optfuse.report import terminal

        terminal.render(outcome.report, stdout())
    for failure in outcome.failures:
        fail(failure, debug)
    if outcome.failures:
        raise typer.Exit(outcome.failures[0].exit_code)


def _write(
    report: Report, as_json: Path | None, as_markdown: Path | None, as_csv: Path | None
) -> None:
    from optfuse.files import write_text
    from optfuse.report import bench as bench_report
    from optfuse.report import markdown, schema

    if as_json:
        write_text(as_json, schema.dump(report))
    if as_markdown:
        write_text(as_markdown, markdown.render(report))
    if as_csv:
        write_text(as_csv, bench_report.csv(report))
