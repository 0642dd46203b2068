"""The command line: parse, call, print. No logic.

Nothing heavy is imported before a command that needs it runs, so that `--help` and `engines`
answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optfuse.errors import OptfuseError
from optfuse.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from optfuse.stages import Notify, Source

INTERRUPTED = 130

app = typer.Typer(
    name="optfuse",
    help="Make a PyTorch model faster to run: proved graph rewrites, ONNX and TensorRT out, and "
    "an honest report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Where the model comes from: path/to/file.py:callable, package.module:callable, "
        "torchvision:NAME or timm:NAME. The callable gives an nn.Module; loading it runs its code.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A .safetensors, .pt or .pth state dict to load."),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="An input, e.g. 1x3x224x224 or ids=1x128:int64. Repeat it for several. Not needed "
        "where the source has an example_inputs().",
    ),
]
PassesOption = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="Which passes run: names, all, none, or all,-name; name.option switches an option on.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seeds every random choice.")]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Allow a weights file to run code while it is unpickled.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the Python traceback of an error.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.")
]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", help="Print nothing but errors; the files are written all the same."),
]


def main() -> None:
    """The console script."""
    app()


def _reporting(command: Callable[..., None]) -> Callable[..., None]:
    """End a command with the error's own exit code, and with its sentences alone on stderr."""

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        debug = bool(arguments.get("debug", False))
        try:
            command(**arguments)
        except OptfuseError as error:
            _fail(error, debug)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _stderr().print("Interrupted.", style="bold")
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:
            raise
        except Exception as error:
            if not debug:
                unexpected = OptfuseError(
                    "optfuse stopped on an error of its own",
                    f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
                    "Run again with --debug to see where, and please report it",
                )
                _fail(unexpected, debug)
                raise typer.Exit(unexpected.exit_code) from None
            raise

    return wrapped


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options that belong to no command."""
    if version:
        typer.echo(f"optfuse {__version__}")
        raise typer.Exit


@app.command()
@_reporting
def optimize(
    source: SourceArgument,
    weights: WeightsOption = None,
    inputs: InputOption = None,
    passes: PassesOption = "all",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An engine to build and measure on. Repeat it for several. By default every "
            "engine that works here; see 'optfuse engines'.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="sm_NN",
            help="A compute capability to build TensorRT-RTX engines for, with or without a GPU "
            "here, e.g. sm_89. Repeat it for several.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder for the results.", show_default="out/NAME"),
    ] = None,
    seed: SeedOption = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of every engine.", show_default="one a physical core"
        ),
    ] = None,
    duration: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long to measure latency; 0 for not."),
    ] = 15.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 5 where a pass had to be undone.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    trust: TrustOption = False,
) -> None:
    """Optimize a model, export it, build engines, and report latency and drift."""
    request_source = _source(source, weights, inputs, seed, trust)
    # A model may print while it is loaded or run; standard output is the report's alone.
    with contextlib.redirect_stdout(sys.stderr), _progress(shown=not quiet) as notify:
        from optfuse.environment import available_threads
        from optfuse.pipeline import Request, run

        outcome = run(
            Request(
                source=request_source,
                output=output,
                passes=passes,
                engines=_split(engine),
                targets=_split(target),
                threads=threads or available_threads(),
                duration_seconds=duration,
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

        terminal.render(outcome.report, _stdout())
    for failure in outcome.failures:
        _fail(failure, debug)
    if outcome.failures:
        raise typer.Exit(outcome.failures[0].exit_code)


@app.command()
@_reporting
def explain(
    source: SourceArgument,
    weights: WeightsOption = None,
    inputs: InputOption = None,
    passes: PassesOption = "all",
    seed: SeedOption = 0,
    debug: DebugOption = False,  # noqa: ARG001 read by _reporting
    trust: TrustOption = False,
) -> None:
    """Show which sites each pass matches, and every refusal with its reason. Writes nothing."""
    request_source = _source(source, weights, inputs, seed, trust)
    with _progress(shown=True) as notify:
        from optfuse import pipeline

        program = pipeline.explain(request_source, passes, notify)
    from optfuse.report import terminal

    terminal.render_explain(program.trace, _stdout())


@app.command("passes")
@_reporting
def list_passes() -> None:
    """List the passes in the order they run, with the equation of each."""
    from rich.padding import Padding
    from rich.text import Text

    from optfuse import passes

    console = _stdout()
    for number, name in enumerate(passes.ORDER, start=1):
        loaded = passes.load(name)
        console.print(f"{number}. {name}", style="bold", highlight=False)
        options = [f"{name}.{option}: {meaning}" for option, meaning in loaded.OPTIONS.items()]
        for text in (loaded.equation, *options):
            console.print(Padding(Text(text), (0, 0, 0, 3)))


@app.command("engines")
@_reporting
def list_engines() -> None:
    """List which engines work here; for a missing one, what installs it."""
    from optfuse import backends

    console = _stdout()
    width = max(len(name) for name in backends.BACKENDS)
    for name in backends.BACKENDS:
        backend = backends.get(name)
        missing = backend.unavailable()
        text = missing if missing else f"ready, {backend.version()}"
        console.print(
            f"{name:{width}}  {text}",
            highlight=False,
            markup=False,
            soft_wrap=True,
            style="dim" if missing else "",
        )


def _source(
    text: str, weights: Path | None, inputs: list[str] | None, seed: int, trust: bool
) -> Source:
    from optfuse.inputs import parse_input
    from optfuse.stages import Source

    return Source(
        text=text,
        weights=weights,
        inputs=tuple(parse_input(each) for each in inputs or ()),
        seed=seed,
        trust=trust,
    )


def _split(names: list[str] | None) -> tuple[str, ...]:
    """`--engine a --engine b` and `--engine a,b` mean the same."""
    words = (word.strip() for name in names or () for word in name.split(","))
    return tuple(dict.fromkeys(filter(None, words)))


def _stdout() -> Console:
    from rich.console import Console

    return Console()


def _stderr() -> Console:
    from rich.console import Console

    # The stream of now: rich would follow a later redirection, and go silent during capture.
    return Console(file=sys.stderr)


def _fail(error: OptfuseError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    console = _stderr()
    console.print("Error:", style="bold red", end=" ")
    console.print(str(error), highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _progress(*, shown: bool) -> Iterator[Notify]:
    """A line on stderr that says what is going on, how far it is and for how long."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=_stderr(),
        transient=True,
        disable=not shown,
    ) as progress:
        task = progress.add_task("Starting", total=None)

        def notify(description: str, fraction: float | None = None) -> None:
            progress.update(task, description=description, total=None if fraction is None else 1.0)
            progress.update(task, completed=fraction or 0.0)

        yield notify
