"""`optfuse passes` and `optfuse engines`: what there is to choose from."""

from __future__ import annotations

from optfuse.cli.application import app, reporting
from optfuse.cli.console import stdout


@app.command("passes")
@reporting
def list_passes() -> None:
    """List the passes in the order they run, with the equation of each."""
    from rich.padding import Padding
    from rich.text import Text

    from optfuse import passes

    console = stdout()
    for number, name in enumerate(passes.ORDER, start=1):
        loaded = passes.load(name)
        console.print(f"{number}. {name}", style="bold", highlight=False)
        options = [f"{name}.{option}: {meaning}" for option, meaning in loaded.OPTIONS.items()]
        for text in (loaded.equation, *options):
            console.print(Padding(Text(text), (0, 0, 0, 3)))


@app.command("engines")
@reporting
def list_engines() -> None:
    """List which engines work here; for a missing one, what installs it."""
    from optfuse import backends

    console = stdout()
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
