"""What engines check of what they are given: that their package is here, a file of the kind they
read, and inputs that fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optfuse.errors import EngineError
from optfuse.stages import Artifact, Program

if TYPE_CHECKING:
    import torch


def require_here(engine: str, missing: str | None) -> None:
    """Refuse an engine whose `unavailable()` says `missing`.

    Raises:
        EngineError: with the line that installs it as the next step.
    """
    if missing is not None:
        cause, _, command = missing.partition(": ")
        raise EngineError(f"The engine '{engine}' is not here", cause, f"Run: {command}")


def onnx_file(engine: str, program: Artifact | Program) -> Path:
    """The ONNX file that an engine is given.

    Raises:
        EngineError: it is given something else.
    """
    if isinstance(program, Artifact) and program.kind == "onnx":
        return program.path
    what = "a captured program" if isinstance(program, Program) else f"'{program.path}'"
    raise EngineError(
        f"The engine '{engine}' cannot open {what}",
        "It reads ONNX files only",
        "Export the program to ONNX first",
    )


def require_fitting(
    engine: str,
    what: str,
    names: Sequence[str],
    dtypes: Sequence[str],
    feeds: Sequence[torch.Tensor],
) -> None:
    """Refuse inputs of another number or dtype than an engine's `what` takes: many engines read
    them through a bare pointer, and would take a wrong dtype for garbage.

    Args:
        engine: its name.
        what: `file` or `program`.
        names, dtypes: of the inputs, e.g. `float32`.
        feeds: what is to be bound.

    Raises:
        EngineError: as it says.
    """
    if len(feeds) != len(names):
        raise EngineError(
            f"The engine '{engine}' cannot bind its inputs",
            f"The {what} takes {len(names)} tensors and got {len(feeds)}",
            "Give one tensor for each input",
        )
    for name, expected, feed in zip(names, dtypes, feeds, strict=True):
        given = str(feed.dtype).removeprefix("torch.")
        if given != expected:
            raise EngineError(
                f"The engine '{engine}' cannot bind the input '{name}'",
                f"It takes {expected} and got {given}",
                "Convert the tensor to that dtype",
            )


def nothing_bound(engine: str) -> EngineError:
    """What a session says that is run before it has inputs."""
    return EngineError(
        f"The engine '{engine}' cannot run", "No inputs were bound", "Call bind() before run()"
    )
