"""`optfuse report` as a user types it: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from optfuse.cli import app
from optfuse.report import schema
from optfuse.stats import Ratio
from tests.report.example import full_report, hostile_report
from tests.report.pages import bench_report, history


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, report in (("one", full_report()), ("bench", bench_report())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(schema.dump(report), encoding="utf-8")
    for day, (_, document) in enumerate(history([Ratio(1.02, 1.01, 1.03), Ratio(1.0, 0.99, 1.01)])):
        (tmp_path / f"day{day}.json").write_text(json.dumps(document), encoding="utf-8")
    return tmp_path


def run(*words: str, width: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["report", *words])


@pytest.mark.parametrize("path", ["one", "one/report.json"])
def test_a_report_is_printed_as_it_was_when_it_was_made(folder: Path, path: str) -> None:
    result = run(path)

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("googlenet: 196 -> 120 operators\nonnxruntime 1.02x [0.99, ")
    assert "\n$ optfuse optimize models/googlenet.py:build --output 'my folder'\n" in result.stdout


def test_a_bench_is_printed_too(folder: Path) -> None:
    assert "Latency and throughput by batch" in run("bench").stdout


def test_several_are_compared(folder: Path) -> None:
    result = run("day0.json", "day1.json", "one")

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("3 reports: 1 model on 2 engines\n")
    assert "Trend of googlenet on onnxruntime" in result.stdout
    assert "day1.json" in result.stdout


def test_files_are_written_and_only_their_paths_are_printed(folder: Path) -> None:
    result = run("one", "--html", "new/page.html", "--markdown", "page.md")

    assert (result.exit_code, result.stdout) == (0, "new/page.html\npage.md\n")
    page = (folder / "new" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>\n")
    assert page.endswith("</html>\n")
    assert (folder / "page.md").read_text(encoding="utf-8").startswith("# googlenet: 196 -> 120")


def test_several_are_written_as_one(folder: Path) -> None:
    result = run("day0.json", "day1.json", "--html", "a.html", "--markdown", "a.md")

    assert result.exit_code == 0, result.output
    assert "<h1" in (folder / "a.html").read_text(encoding="utf-8")
    assert (folder / "a.md").read_text(encoding="utf-8").startswith("# 2 reports: 1 model on ")


def test_an_older_report_is_read(folder: Path) -> None:
    old = Path(__file__).parent / "report" / "data" / "report-v1.json"
    result = run(str(old), "--html", "a.html")

    assert result.exit_code == 0, result.output


def test_hostile_names_reach_neither_the_terminal_nor_the_page(folder: Path) -> None:
    (folder / "hostile.json").write_text(schema.dump(hostile_report()), encoding="utf-8")

    assert "\x1b" not in run("hostile.json", "one").stdout
    assert run("hostile.json", "--html", "a.html").exit_code == 0
    assert "<script" not in (folder / "a.html").read_text(encoding="utf-8")


BAD = {
    "truncated.json": b'{"schema_version": 2, "kind": ',
    "binary.json": b"\x00\xff\xfe\x9c report",
    "foreign.json": b'{"name": "something else"}',
    "nan.json": b'{"schema_version": 2, "kind": "optimize", "latency": NaN}',
    "newer.json": b'{"schema_version": 999, "kind": "optimize"}',
    "empty.json": b"",
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_report_is_named_in_one_sentence_each(folder: Path, name: str) -> None:
    (folder / name).write_bytes(BAD[name])
    result = run("one", name, "--html", "a.html")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"The report {name} cannot be read." in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "a.html").exists()


@pytest.mark.parametrize("path", ["nowhere", "nowhere/report.json", "hollow"])
def test_what_does_not_exist_is_an_error_of_use(folder: Path, path: str) -> None:
    (folder / "hollow").mkdir()
    result = run(path)

    assert result.exit_code == 2
    assert f"There is no report at {path}." in result.stderr


def test_a_page_that_cannot_be_written_leaves_nothing_behind(folder: Path) -> None:
    result = run("one", "--html", "one/report.json/page.html")

    assert result.exit_code == 6
    assert "cannot be written" in result.stderr
    assert sorted(each.name for each in (folder / "one").iterdir()) == ["report.json"]


def test_at_least_one_report_is_needed(folder: Path) -> None:
    assert run().exit_code == 2
