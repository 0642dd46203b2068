"""Where a command prints: the report on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from optfuse.stages import Notify


def stdout() -> Console:
    """For what was asked for."""
    from rich.console import Console

    return Console()


def stderr() -> Console:
    """For progress and errors."""
    from rich.console import Console

    # The stream of now: rich would follow a later redirection, and go silent during capture.
    return Console(file=sys.stderr)


@contextlib.contextmanager
def progress(*, shown: bool) -> Iterator[Notify]:
    """A line on stderr that says what is going on, how far it is and for how long."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=stderr(),
        transient=True,
        disable=not shown,
    ) as bar:
        task = bar.add_task("Starting", total=None)

        def notify(description: str, fraction: float | None = None) -> None:
            bar.update(task, description=description, total=None if fraction is None else 1.0)
            bar.update(task, completed=fraction or 0.0)

        yield notify
