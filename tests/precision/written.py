"""A program in low precision, as torch.export has it."""

from __future__ import annotations

from dataclasses import replace

from optfuse.graph import export_again
from optfuse.stages import Program


def exported_again(program: Program) -> Program:
    """The program with an `exported` that is its graph as it is now."""
    return replace(program, exported=export_again(program))
