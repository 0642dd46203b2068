"""Files appear whole or not at all, and what goes wrong is one OutputError."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from optfuse import files
from optfuse.errors import OutputError
from optfuse.files import sha256, staged, write_bytes, write_text, writing


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_staged_files_appear_together_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    with staged(folder) as temporary:
        (temporary / "model.onnx").write_text("graph")
        (temporary / "model.onnx.data").write_text("weights")
        assert temporary.parent == folder, "a rename is whole only inside one file system"
        assert not (folder / "model.onnx").exists()
    assert names(folder) == ["model.onnx", "model.onnx.data"]
    assert (folder / "model.onnx").read_text() == "graph"
    assert (folder / "model.onnx.data").read_text() == "weights"


def test_a_file_appears_only_after_the_data_it_points_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    real = Path.replace

    def noted(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    with staged(tmp_path) as temporary:
        for name in ("model.onnx", "model.onnx.data"):
            (temporary / name).write_text("x")
    assert moved == ["model.onnx.data", "model.onnx"]


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.json").write_text("old")
    write_text(tmp_path / "report.json", "new")
    assert names(tmp_path) == ["notes.txt", "report.json"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "report.json").read_text() == "new"


@pytest.mark.parametrize("interruption", [ValueError("a bug"), KeyboardInterrupt()])
def test_an_exception_inside_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, interruption: BaseException
) -> None:
    (tmp_path / "model.onnx").write_text("old")

    def interrupted() -> None:
        with staged(tmp_path) as temporary:
            (temporary / "model.onnx").write_text("half a fi")
            raise interruption

    with pytest.raises(type(interruption)):
        interrupted()
    assert names(tmp_path) == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


def test_text_is_written_as_utf8_with_its_line_ends_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "report.md", "1 · 2\nµs\n")
    assert (tmp_path / "report.md").read_bytes() == "1 · 2\nµs\n".encode()


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_bytes(tmp_path / "engine", memoryview(b"\x00\x01\xff"))
    assert (tmp_path / "engine").read_bytes() == b"\x00\x01\xff"


def test_what_is_written_can_be_read_by_others(tmp_path: Path) -> None:
    """The temporary folder is private; the files in it must get the usual permissions."""
    previous = os.umask(0o022)
    try:
        write_text(tmp_path / "report.md", "for everyone")
    finally:
        os.umask(previous)
    assert (tmp_path / "report.md").stat().st_mode & 0o777 == 0o644


REFUSED = [
    (errno.ENOSPC, "The disk is full.", "Free some space, or choose another place."),
    (errno.EDQUOT, "The disk is full.", "Free some space, or choose another place."),
    *[
        (
            number,
            "It may not be written to.",
            "Choose a place of your own, or change its permissions.",
        )
        for number in (errno.EACCES, errno.EPERM, errno.EROFS)
    ],
    (errno.EIO, "Input/output error.", "Choose another place."),
]


@pytest.mark.parametrize(("number", "cause", "step"), REFUSED)
def test_a_failing_write_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cause: str, step: str
) -> None:
    def refuse(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])  # a full disk takes the beginning
        raise OSError(number, os.strerror(number))

    target = tmp_path / "report.json"
    target.write_text("old")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OutputError) as raised:
        write_text(target, "new content")
    assert str(raised.value) == f"The results cannot be written to {tmp_path}. {cause} {step}"
    assert raised.value.exit_code == 6
    assert isinstance(raised.value.__cause__, OSError)
    assert names(tmp_path) == ["report.json"]
    assert target.read_text() == "old"


def test_a_folder_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because root may write everywhere."""

    def refuse(**_where: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with pytest.raises(OutputError, match="It may not be written to"), staged(tmp_path):
        pytest.fail("there is no folder to write in")
    assert names(tmp_path) == []


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "out").write_text("I am a file")
    with pytest.raises(OutputError) as raised, staged(tmp_path / "out" / below):
        pytest.fail("there is no folder to write in")
    assert raised.value.cause == "A file stands where a folder should be"
    assert raised.value.next_step == "Choose another place"
    assert (tmp_path / "out").read_text() == "I am a file"


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OutputError) as raised:
        write_text(tmp_path / "report.md", "text")
    assert raised.value.cause == "A folder stands where a file should be"
    assert names(tmp_path) == ["report.md"]


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as raised:
        write_text(tmp_path / ("x" * 300), "text")
    assert str(raised.value) == (
        f"The results cannot be written to {tmp_path}. File name too long. Choose another place."
    )


def test_writing_names_what_it_was_about(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as raised, writing("The engine", tmp_path):
        raise OSError("no number, only words")
    assert raised.value.thing == f"The engine cannot be written to {tmp_path}"
    assert raised.value.cause == "no number, only words"


def test_an_error_of_ours_passes_through_as_it_is(tmp_path: Path) -> None:
    inner = OutputError("The engine cannot be written", "It is too large", "Buy a larger disk")
    with pytest.raises(OutputError) as raised, staged(tmp_path):
        raise inner
    assert raised.value is inner


@pytest.mark.parametrize("size", [3, (1 << 20) + 17])
def test_sha256_reads_all_of_the_file(tmp_path: Path, size: int) -> None:
    content = bytes(number % 251 for number in range(size))
    (tmp_path / "engine").write_bytes(content)
    assert sha256(tmp_path / "engine") == hashlib.sha256(content).hexdigest()
