"""`optfuse optimize`: a model to ONNX files, engines and a report."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from optfuse.cli.application import app, fail, reporting
from optfuse.cli.console import progress, stdout
from optfuse.cli.options import (
    DebugOption,
    DimOption,
    InputOption,
    JsonOption,
    NormalizeOption,
    PassesOption,
    QuietOption,
    SeedOption,
    SourceArgument,
    ThreadsOption,
    TrustOption,
    WeightsOption,
    source_of,
    split,
)

ENGINES, PRECISION = "Engines", "Precision"
"""Headings of the help."""


@app.command()
@reporting
def optimize(
    source: SourceArgument,
    weights: WeightsOption = None,
    inputs: InputOption = None,
    dim: DimOption = None,
    normalize: NormalizeOption = None,
    passes: PassesOption = "all",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An engine to build and measure on. Repeat it for several. By default every "
            "engine that works here and needs no minutes to compile; auto takes these as well, "
            "and recommends one. See 'optfuse engines'.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="sm_NN",
            help="A compute capability to build TensorRT-RTX engines for, with or without a GPU "
            "here, e.g. sm_89. Repeat it for several.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder for the results.", show_default="out/NAME"),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the layers: fp32, fp16, bf16, int8, or mixed, which keeps those in float32 "
            "that drift too much in --low-precision, see --max-drift.",
            rich_help_panel=PRECISION,
        ),
    ] = "fp32",
    io_precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the inputs and outputs that are float32 in the model: fp32, fp16 or bf16.",
            rich_help_panel=PRECISION,
        ),
    ] = "fp32",
    low_precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the low layers of --precision mixed: fp16, bf16 or int8.",
            rich_help_panel=PRECISION,
            show_default="int8 with --data, else fp16",
        ),
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of --precision mixed: the relative L2 distance to float64 that the outputs stay "
            "within.",
            rich_help_panel=PRECISION,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own inputs, .npz, .npy or .safetensors: half of them calibrate int8, and "
            "drift is taken on the others.",
            rich_help_panel=PRECISION,
        ),
    ] = None,
    random_calibration: Annotated[
        bool,
        typer.Option(
            "--random-calibration",
            help="Calibrate int8 on random inputs: for latency alone, the outputs are worth "
            "little.",
            rich_help_panel=PRECISION,
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Build TensorRT engines that later versions of the package load, too; "
            "TensorRT-RTX has none such.",
            rich_help_panel=ENGINES,
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Build TensorRT engines that GPUs of later architectures run, too.",
            rich_help_panel=ENGINES,
        ),
    ] = False,
    output_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What an output is called in both ONNX files. Repeat it, once for each output in "
            "order.",
            show_default="as torch.onnx names it",
        ),
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    duration: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long to measure latency; 0 for not."),
    ] = 15.0,
    ablate: Annotated[
        bool,
        typer.Option("--ablate", help="Measure also what each pass earns, alone and left out."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 5 where a pass had to be undone.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    trust: TrustOption = False,
) -> None:
    """Optimize a model, export it, build engines, and report latency and drift."""
    request_source = source_of(source, weights, inputs, seed, trust, normalize, dim)
    # A model may print while it is loaded or run; standard output is the report's alone.
    with contextlib.redirect_stdout(sys.stderr), progress(shown=not quiet) as notify:
        from optfuse.environment import available_threads
        from optfuse.pipeline import Request, run
        from optfuse.precision.plan import plan_of

        outcome = run(
            Request(
                source=request_source,
                output=output,
                output_names=tuple(output_name or ()),
                passes=passes,
                engines=split(engine),
                targets=split(target),
                threads=threads or available_threads(),
                duration_seconds=duration,
                plan=plan_of(
                    precision,
                    io=io_precision,
                    low=low_precision,
                    max_drift=max_drift,
                    has_data=data is not None,
                ),
                data=data,
                random_calibration=random_calibration,
                version_compatible=version_compatible,
                hardware_compatible=hardware_compatible,
                ablate=ablate,
                strict=strict,
                command=("optfuse", *sys.argv[1:]),
            ),
            notify,
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
