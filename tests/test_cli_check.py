"""`optfuse check` as a user types it: what it prints, what it leaves, how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner, Result

from optfuse.cli import app
from optfuse.report import bench
from optfuse.report.schema import dump
from optfuse.stages import Report
from tests.report.example import full_report
from tests.test_gate import drift_of, edited, environment, report


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, with a report in `now/` and an earlier one in `then/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    put("now", report())
    put("then", report(median_ms=9.0))
    return tmp_path


def put(name: str, found: Report) -> None:
    """Write a report into a folder of the current one."""
    Path(name).mkdir(exist_ok=True)
    Path(name, "report.json").write_text(dump(found), encoding="utf-8")


def run(*words: str, width: int = 80, **variables: str) -> Result:
    return CliRunner(env={"COLUMNS": str(width), **variables}).invoke(app, ["check", *words])


def drifted() -> Report:
    """With a planted drift on onnxruntime."""
    return edited(report(), lambda document: drift_of(document).update(relative_l2=0.031))


@pytest.mark.parametrize("width", [80, 120])
def test_a_report_within_its_limits_passes(folder: Path, width: int) -> None:
    result = run(
        "now", "--engine", "onnxruntime", "--max-drift", "1e-5", "--max-drift-ratio", "2",
        "--min-top1", "0.99", "--min-speedup", "1.1", "--max-slowdown", "1.05",
        "--baseline", "then", "--max-operators", "150", width=width,
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "googlenet: passed (6 passed)"
    assert sum(line.rstrip().endswith(" passed") for line in lines[1:]) == 6
    assert all(cell_len(line) <= width for line in lines)


def test_a_planted_drift_exits_with_1_and_a_sentence(folder: Path) -> None:
    put("now", drifted())
    result = run("now", "--max-drift", "1e-5", "--engine", "onnxruntime")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The limit --max-drift on onnxruntime does not hold. onnxruntime: the drift from "
        "the float64 program is 3.1e-02 (relative L2); the limit is 1e-05 at most. Find the layer "
        "it comes from with 'optfuse diff --per-layer', or raise the limit.\n"
    )
    assert "googlenet: failed (1 failed)" in result.stdout
    assert "3.1e-02  failed" in result.stdout


def test_quiet_prints_nothing_but_what_fails(folder: Path) -> None:
    assert run("now", "--max-operators", "150", "--quiet").output == ""
    result = run("now", "--max-operators", "100", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "The optimized program has 120 operators; the limit is 100 at most." in result.stderr


def test_strict_fails_what_could_not_be_decided(folder: Path) -> None:
    words = ("now", "--engine", "onnxruntime", "--min-speedup", "1.2")
    assert run(*words).exit_code == 0
    assert "undecided" in run(*words).stdout
    strict = run(*words, "--strict")
    assert strict.exit_code == 1
    assert "the interval reaches both sides of it" in strict.stderr


def test_a_slowdown_is_held_against_the_baseline(folder: Path) -> None:
    then = report(median_ms=8.0, environment=environment(python="3.11.9"))
    put("then", then)
    put("now", report(median_ms=10.0, environment=environment()))
    words = ("now/report.json", "--engine", "onnxruntime", "--baseline", "then/report.json")
    result = run(*words, "--max-slowdown", "1.1")
    assert result.exit_code == 1
    assert "a run takes 1.25x [" in result.stderr
    assert "versions: python was 3.11.9 and is 3.12.1" in result.stdout
    assert run(*words, "--max-slowdown", "1.4").exit_code == 0


def test_limits_may_stand_in_pyproject(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[tool.optfuse.check]\nmax-operators = 100\n")
    assert run("now").exit_code == 1
    assert run("now", "--max-operators", "150").exit_code == 0
    (folder / "easy.toml").write_text("[tool.optfuse.check]\nmax-operators = 150\n")
    assert run("now", "--config", "easy.toml").exit_code == 0


def test_strict_in_a_file_can_be_taken_back(folder: Path) -> None:
    (folder / "pyproject.toml").write_text(
        '[tool.optfuse.check]\nmin-speedup = 1.2\nengine = "onnxruntime"\nstrict = true\n'
    )
    assert run("now").exit_code == 1
    assert run("now", "--no-strict").exit_code == 0


def test_junit_is_written_whole(folder: Path) -> None:
    put("now", drifted())
    result = run("now", "--max-drift", "1e-5", "--max-operators", "150", "--junit", "a/b.xml")
    assert result.exit_code == 1
    root = ElementTree.parse(folder / "a" / "b.xml").getroot()
    # onnxruntime fails, torch passes, tensorrt-rtx was only built; and the operators pass.
    counts = {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "1", "errors": "0", "skipped": "1"}
    assert [path.name for path in (folder / "a").iterdir()] == ["b.xml"]


def test_github_gets_annotations_and_a_summary(folder: Path) -> None:
    put("now", drifted())
    words = ("now", "--max-drift", "1e-5", "--engine", "onnxruntime", "--github")
    result = run(*words, GITHUB_STEP_SUMMARY=str(folder / "summary.md"))
    assert (result.exit_code, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert lines[-1].startswith(
        "::error title=optfuse check --max-drift on onnxruntime%3A failed::onnxruntime: the drift "
    )
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("# googlenet: failed (1 failed)\n")
    assert "| drift | onnxruntime | &lt;= 1e-05 | 3.1e-02 | failed |" in summary
    # Outside of GitHub there is no summary to add to.
    (folder / "summary.md").unlink()
    assert run(*words).exit_code == 1
    assert not (folder / "summary.md").exists()


def test_no_name_is_taken_for_a_command_of_github(folder: Path) -> None:
    def rename(document: dict[str, Any]) -> None:
        document["program"]["name"] = "::error::planted"
        drift_of(document).update(engine="::add-mask::o", relative_l2=0.5)

    put("now", edited(report(), rename))
    result = run("now", "--max-drift", "1e-5", "--github")
    lines = result.stdout.splitlines()
    token = lines[0].removeprefix("::stop-commands::")
    assert len(token) == 32
    end = lines.index(f"::{token}::")
    commands = [line for line in lines if line.lstrip().startswith("::")]
    outside = [lines[0], *lines[end:]]
    assert "::error::planted: failed" in lines[1]
    assert [line for line in commands if line in outside] == outside
    assert all(line.startswith(("::error title=", "::warning title=")) for line in outside[2:])
    other = run("now", "--max-drift", "1e-5", "--github").stdout.splitlines()[0]
    assert other != lines[0], "a token that can be foreseen stops nothing"


def test_github_and_quiet_print_annotations_alone(folder: Path) -> None:
    result = run("now", "--max-operators", "100", "--github", "--quiet")
    assert result.exit_code == 1
    [line] = result.stdout.splitlines()
    assert line.startswith("::error title=optfuse check --max-operators%3A failed::")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("gone", "--max-drift", "1"), 2, "There is no such file"),
        ((".", "--max-drift", "1"), 2, "The folder has no report.json"),
        (("now",), 2, "No limit was given"),
        (("now", "--max-drift", "nan"), 2, "It is not a finite number"),
        (("now", "--max-drift", "-1"), 2, "It is below 0"),
        (("now", "--max-drift", "small"), 2, "Invalid value for '--max-drift'"),
        (("now", "--min-top1", "99.9"), 2, "It is a share, from 0 to 1"),
        (("now", "--max-operators", "1.5"), 2, "Invalid value for '--max-operators'"),
        (("now", "--max-slowdown", "1.1"), 2, "It compares with an earlier report"),
        (("now", "--max-drift", "1", "--baseline", "then"), 2, "Only --max-slowdown compares"),
        (("now", "--max-slowdown", "1.1", "--baseline", "gone"), 2, "There is no such file"),
        (("now", "--max-slowdown", "1.1", "--baseline", "now"), 2, "is the very same report"),
        (("now", "--max-drift", "1", "--engine", "openvino"), 2, "has no engine 'openvino'"),
        (("now", "--max-drift", "1", "--config", "gone.toml"), 2, "No such file or directory"),
        (("now", "--max-engine-layers", "9", "--engine", "torch"), 2, "no engine that was built"),
        (("cut.json", "--max-drift", "1"), 1, "It is not valid JSON"),
        (("infinite.json", "--max-drift", "1"), 1, "Infinity is not a JSON number"),
        (("foreign.json", "--max-drift", "1"), 1, "it is not a report of optfuse"),
        (("binary.json", "--max-drift", "1"), 1, "It is not text"),
        (("empty.json", "--max-drift", "1"), 1, "samples_ms: [] should be non-empty"),
        (("now", "--max-drift", "1", "--junit", "now/report.json/x"), 6, "A file stands where"),
    ],
)
def test_bad_input_is_one_error_and_an_exit_code(
    folder: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    text = dump(report())
    (folder / "cut.json").write_text(text[: len(text) // 2], encoding="utf-8")
    infinite = text.replace('"relative_l2": 4e-07', '"relative_l2": Infinity')
    (folder / "infinite.json").write_text(infinite, encoding="utf-8")
    (folder / "foreign.json").write_text('{"results": [1, 2]}', encoding="utf-8")
    (folder / "binary.json").write_bytes(b"\x08\xff\xfe")
    samples = edited(report(), lambda document: document["latency"][0].update(samples_ms=[]))
    (folder / "empty.json").write_text(json.dumps(samples.document), encoding="utf-8")
    result = run(*words, width=200)
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("Error") == 1


def test_reports_without_a_common_engine_cannot_be_compared(folder: Path) -> None:
    put("then", full_report(measurements=[], comparisons=[], noise_floors=[]))
    result = run("now", "--max-slowdown", "1.1", "--baseline", "then", "--engine", "onnxruntime")
    assert result.exit_code == 2
    assert "onnxruntime: the baseline report has no latency of it." in result.stderr
    assert "googlenet: not checked (1 not compared)" in result.stdout


def test_a_report_of_another_kind_is_refused(folder: Path) -> None:
    settings = {
        **{"threads": 1, "isolated": False, "seed": 0, "duration_seconds": 1.0},
        **{"warmup_ms": 200.0, "blocks": [10, 40]},
    }
    measured = bench.assemble(
        contenders=[bench.Contender("net@torch", "net.py:build", "source", "torch", "2.13", None)],
        runs=[bench.BatchRun(None, {})],
        ceilings=None,
        command=["optfuse", "bench", "net.py:build"],
        environment={},
        settings=settings,
    )
    put("measured", measured)
    result = run("measured", "--max-drift", "1")
    assert result.exit_code == 2
    assert "A report of the kind 'bench' cannot be checked" in result.stderr


def test_a_check_needs_no_torch(folder: Path) -> None:
    """Importing it takes longer than the whole check."""
    code = (
        "import sys\nfrom optfuse.cli import main\n"
        "sys.argv = ['optfuse', 'check', 'now', '--max-operators', '150', '--quiet']\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code, exit.code\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
