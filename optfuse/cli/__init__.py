"""The command line: parse, call, print. No logic. One file a command.

Nothing heavy is imported before a command that needs it runs, so that `--help` and `engines`
answer at once. `app` lists the commands in the order of the imports below.
"""

from __future__ import annotations

from optfuse.cli.application import INTERRUPTED, app

from optfuse.cli import optimize, bench, diff, check, report, explain, listings  # isort: skip

__all__ = [
    "INTERRUPTED",
    "app",
    "bench",
    "check",
    "diff",
    "explain",
    "listings",
    "main",
    "optimize",
    "report",
]


def main() -> None:
    """The console script."""
    app()
