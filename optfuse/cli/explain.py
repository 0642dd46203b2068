"""`optfuse explain`: what became of every convolution, or what every pass did, and why."""

from __future__ import annotations

import contextlib
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from optfuse.cli.application import app, reporting
from optfuse.cli.console import progress, stdout
from optfuse.cli.options import (
    DebugOption,
    DimOption,
    InputOption,
    NormalizeOption,
    PassesOption,
    SeedOption,
    SourceArgument,
    TrustOption,
    WeightsOption,
    source_of,
)
from optfuse.errors import UsageError

if TYPE_CHECKING:
    from optfuse.pipeline import Explanation


class View(str, Enum):
    """What there is one entry for."""

    CONVOLUTION = "convolution"
    PASS = "pass"


@app.command()
@reporting
def explain(
    source: SourceArgument,
    weights: WeightsOption = None,
    inputs: InputOption = None,
    dim: DimOption = None,
    normalize: NormalizeOption = None,
    passes: PassesOption = "all",
    by: Annotated[
        View, typer.Option(help="One entry for each convolution, or one for each pass.")
    ] = View.CONVOLUTION,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Only convolutions of modules whose path fits, e.g. 'features.stem.*'.",
        ),
    ] = None,
    seed: SeedOption = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON, and nothing else, on stdout.")
    ] = False,
    debug: DebugOption = False,  # noqa: ARG001 read by reporting
    trust: TrustOption = False,
) -> None:
    """Say of every convolution what the passes made of it, and why. Writes nothing."""
    by_pass = by is View.PASS
    if module is not None and by_pass:
        raise UsageError(
            "--module cannot be used together with --by pass",
            "It chooses among convolutions",
            "Leave one of the two out",
        )
    request_source = source_of(source, weights, inputs, seed, trust, normalize, dim)
    # A model may print while it is loaded or run; standard output is the answer's alone.
    with contextlib.redirect_stdout(sys.stderr), progress(shown=True) as notify:
        from optfuse import pipeline

        explanation = pipeline.explain(request_source, passes, module, notify)
    if json:
        from optfuse.report import schema

        typer.echo(schema.dump(explanation.document(by_pass=by_pass)), nl=False)
    else:
        _print(explanation, by_pass)


def _print(explanation: Explanation, by_pass: bool) -> None:
    from optfuse.report import terminal

    if by_pass:
        terminal.render_explain(explanation.program.trace, stdout())
    else:
        told = explanation.histories
        terminal.render_histories(told, explanation.norms, explanation.elsewhere, stdout())
