"""Reports from disk: the file itself, or the folder that holds it."""

from __future__ import annotations

from pathlib import Path

from optfuse.errors import OptfuseError, UsageError
from optfuse.report.schema import parse
from optfuse.stages import Report

FILE_NAME = "report.json"


def read(path: Path) -> Report:
    """The report in a file, or in the `report.json` of a folder.

    Raises:
        UsageError: there is no such file, or none in the folder.
        OptfuseError: it cannot be read; see `schema.parse`.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = f"The folder has no {FILE_NAME}" if path.is_dir() else "There is no such file"
        raise UsageError(
            f"There is no report at {path}", found, "Give what 'optfuse optimize' wrote"
        ) from None
    except UnicodeDecodeError:
        raise _unreadable(file, "It is not text", "Give what 'optfuse optimize' wrote") from None
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise _unreadable(file, cause, "Look at the file and its permissions") from None
    try:
        return parse(text)
    except OptfuseError as error:
        raise _unreadable(file, error.cause, error.next_step) from None


def _unreadable(file: Path, cause: str, next_step: str) -> OptfuseError:
    return OptfuseError(f"The report {file} cannot be read", cause, next_step)
