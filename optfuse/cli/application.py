"""The application: its own options, and how a command ends, well or badly."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from optfuse.cli.console import stderr
from optfuse.errors import OptfuseError
from optfuse.version import __version__

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


def reporting(command: Callable[..., None]) -> Callable[..., None]:
    """End a command with the error's own exit code, and with its sentences alone on stderr."""

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        debug = bool(arguments.get("debug", False))
        try:
            command(**arguments)
        except OptfuseError as error:
            fail(error, debug)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            stderr().print("Interrupted.", style="bold")
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
                fail(unexpected, debug)
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


def fail(error: OptfuseError, debug: bool) -> None:
    """Print an error's sentences on standard error, after its traceback where that is asked for."""
    if debug:
        traceback.print_exception(error)
    console = stderr()
    console.print("Error:", style="bold red", end=" ")
    console.print(str(error), highlight=False, markup=False, soft_wrap=True)
