"""`optfuse explain`: every place that each pass matched, and every refusal with its reason."""

from __future__ import annotations

from optfuse.cli.application import app, reporting
from optfuse.cli.console import progress, stdout
from optfuse.cli.options import (
    DebugOption,
    InputOption,
    NormalizeOption,
    PassesOption,
    SeedOption,
    SourceArgument,
    TrustOption,
    WeightsOption,
    source_of,
)


@app.command()
@reporting
def explain(
    source: SourceArgument,
    weights: WeightsOption = None,
    inputs: InputOption = None,
    normalize: NormalizeOption = None,
    passes: PassesOption = "all",
    seed: SeedOption = 0,
    debug: DebugOption = False,  # noqa: ARG001 read by reporting
    trust: TrustOption = False,
) -> None:
    """Show which sites each pass matches, and every refusal with its reason. Writes nothing."""
    request_source = source_of(source, weights, inputs, seed, trust, normalize)
    with progress(shown=True) as notify:
        from optfuse import pipeline

        program = pipeline.explain(request_source, passes, notify)
    from optfuse.report import terminal

    terminal.render_explain(program.trace, stdout())
