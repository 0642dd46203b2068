"""Every error a user can meet, as one tree. Each class carries the exit code it ends a run with.

    OptfuseError                 1
    ├── UsageError               2   the command line asks for something that does not exist
    ├── ModelError               3   the model cannot be taken through the pipeline
    │   ├── LoadError            3   the source or its weights cannot be loaded
    │   ├── CaptureError         3   torch.export cannot capture the model
    │   └── ExportError          3   the program cannot be written as ONNX
    ├── EngineError              4   an engine is missing, or failed to build or run
    ├── FunctionChangedError     5   with --strict: a pass changed the function and was undone
    └── OutputError              6   a result cannot be written (read-only, full disk)

Every error has three parts, one sentence each: the thing, the cause, the next step.
"""

from __future__ import annotations


class OptfuseError(Exception):
    """Something a user can act on.

    Args:
        thing: what could not be done, without a full stop.
        cause: why, in one sentence.
        next_step: what to do about it, in one sentence.
    """

    exit_code = 1

    def __init__(self, thing: str, cause: str, next_step: str) -> None:
        super().__init__(thing, cause, next_step)
        self.thing = thing
        self.cause = cause
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{_sentence(self.thing)} {_sentence(self.cause)} {_sentence(self.next_step)}"


class UsageError(OptfuseError):
    """The command line asks for something that does not exist or cannot be combined."""

    exit_code = 2


class ModelError(OptfuseError):
    """The model cannot be taken through the pipeline."""

    exit_code = 3


class LoadError(ModelError):
    """The source or its weights cannot be loaded."""


class CaptureError(ModelError):
    """torch.export cannot capture the model."""


class ExportError(ModelError):
    """The program cannot be written as ONNX."""


class EngineError(OptfuseError):
    """An engine is missing, or failed to build or to run."""

    exit_code = 4


class FunctionChangedError(OptfuseError):
    """A pass changed the function; it was undone, and the user asked to be stopped by that."""

    exit_code = 5


class OutputError(OptfuseError):
    """A result cannot be written."""

    exit_code = 6


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."
