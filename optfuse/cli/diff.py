"""`optfuse diff`: how far outputs are apart, and which layer is the first to drift."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from optfuse.cli.application import app, reporting
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
)


@app.command()
@reporting
def diff(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT[@ENGINE]",
            help="What is compared: model sources, .onnx files, engine files, or folders that "
            "'optfuse optimize' wrote. A model source given first is the reference, in float64; an "
            "ONNX file alone is compared with itself in float64; otherwise the first as it runs "
            "is the reference.",
        ),
    ],
    weights: WeightsOption = None,
    inputs: InputOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Inputs of your own: a .npz, .npy or .safetensors file with an array for each "
            "input, named after it. Several runs' worth of them are several samples.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="How many random inputs.", show_default="one, the examples"
        ),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Compare the first one, a model source, also with what these passes make of it "
            "on PyTorch.",
        ),
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer", help="Compare layer by layer, and name the first one that drifts."
        ),
    ] = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    export_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report, every layer included.")
    ] = None,
    export_markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write its tables as Markdown.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 read by reporting
    trust: TrustOption = False,
) -> None:
    """Compare outputs, and with --per-layer every layer, in float64. Exits with 0 however far apart
    they are: 'optfuse check' is for limits."""
    # A model may print while it is loaded or run; standard output is the report's alone.
    with contextlib.redirect_stdout(sys.stderr), progress(shown=not quiet) as notify:
        from optfuse import diff as comparing
        from optfuse.environment import available_threads
        from optfuse.inputs import parse_input

        report = comparing.diff(
            comparing.DiffRequest(
                subjects=tuple(subjects),
                passes=passes,
                weights=weights,
                inputs=tuple(parse_input(each) for each in inputs or ()),
                seed=seed,
                trust=trust,
                data=data,
                samples=samples,
                per_layer=per_layer,
                threads=threads or available_threads(),
                command=("optfuse", *sys.argv[1:]),
            ),
            notify,
        )
        from optfuse.files import write_text
        from optfuse.report import markdown, schema, terminal

        if export_json:
            write_text(export_json, schema.dump(report))
        if export_markdown:
            write_text(export_markdown, markdown.render(report))
    if json:
        typer.echo(schema.dump(report), nl=False)
    elif not quiet:
        terminal.render(report, stdout())
