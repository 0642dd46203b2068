"""Reports from disk: where they are looked for, and what is said of a file that is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from optfuse.errors import OptfuseError, UsageError
from optfuse.report.reading import read
from optfuse.report.schema import dump
from tests.report.example import full_report


def test_a_report_is_named_by_its_file_or_its_folder(tmp_path: Path) -> None:
    report = full_report()
    (tmp_path / "report.json").write_text(dump(report), encoding="utf-8")
    (tmp_path / "other.json").write_text(dump(report), encoding="utf-8")
    for path in (tmp_path, tmp_path / "report.json", tmp_path / "other.json"):
        assert dump(read(path)) == dump(report)


def test_what_is_not_there_is_an_error_of_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no report at .*gone\. There is no such file\."):
        read(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"The folder has no report\.json\."):
        read(tmp_path)


def full() -> str:
    return dump(full_report())


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "It is not valid JSON"),
        (full()[:2000], "It is not valid JSON"),
        (full().replace("0.986", "NaN"), "NaN is not a JSON number"),
        (full().replace("0.986", "-Infinity"), "-Infinity is not a JSON number"),
        (full().replace("0.986", "1e999"), "1e999 is too large for a number"),
        ("[" * 100_000, "It is not valid JSON"),
        (json.dumps({"ir_version": 8, "graph": {}}), "so it is not a report of optfuse"),
        ('{"schema_version": 99}', "Its schema version is 99"),
        (full().replace('"engine": "onnxruntime"', '"engine": 3'), "At $."),
    ],
)
def test_what_is_no_report_is_named_with_the_reason(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(OptfuseError) as refused:
        read(tmp_path)
    assert type(refused.value) is OptfuseError
    assert refused.value.thing == f"The report {tmp_path / 'report.json'} cannot be read"
    assert cause in refused.value.cause


def test_a_binary_file_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08\xff\xfe")
    with pytest.raises(OptfuseError, match=r"It is not text\. Give what 'optfuse optimize' wrote"):
        read(tmp_path / "model.onnx")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(full(), encoding="utf-8")
    file.chmod(0)
    with pytest.raises(OptfuseError, match="Permission denied"):
        read(file)


def test_a_path_that_leads_through_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    with pytest.raises(OptfuseError, match="Not a directory"):
        read(tmp_path / "file" / "report.json")
