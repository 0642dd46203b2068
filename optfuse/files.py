"""Files appear whole or not at all: write beside, then rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optfuse.errors import OutputError


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError raised inside into an OutputError about `what` at `path`."""
    try:
        yield
    except OSError as error:
        raise _explain(what, path, error) from error


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`; its files are moved up into `folder` at the end, the
    longest names first, so that `model.onnx.data` is there before `model.onnx`.

    On an error nothing is moved and the temporary folder goes away.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    with writing("The results", folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            yield temporary
            for written in sorted(temporary.iterdir(), reverse=True):
                written.replace(folder / written.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole.

    Raises:
        OutputError: it cannot be written; an older file at `path` is then untouched.
    """
    with staged(path.parent) as temporary:
        (temporary / path.name).write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def cache_folder() -> Path:
    """Where what is worth keeping between runs is kept, by the XDG convention."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "optfuse"


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _explain(what: str, path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause, step = "The disk is full", "Free some space, or choose another place"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cause = "It may not be written to"
        step = "Choose a place of your own, or change its permissions"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        cause = "A file stands where a folder should be"
        step = "Choose another place"
    elif error.errno == errno.EISDIR:
        cause = "A folder stands where a file should be"
        step = "Choose another place"
    else:
        cause = error.strerror or str(error)
        step = "Choose another place"
    return OutputError(f"{what} cannot be written to {path}", cause, step)
