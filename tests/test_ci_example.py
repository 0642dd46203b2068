"""The sample workflow and docs/ci.md: they parse, and every command in them is one of optfuse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from optfuse.cli import app
from optfuse.limits import Limits, option, settings
from optfuse.report.schema import dump
from tests.test_gate import report

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / "examples" / "ci" / "optfuse.yml"
DOCS = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


def workflow() -> Any:
    # The base loader reads `on` as a word; for YAML 1.1 it is another way to say true.
    return yaml.load(WORKFLOW.read_text(encoding="utf-8"), yaml.BaseLoader)


def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workflow()["jobs"]["gate"]["steps"]
    return found


COMMANDS = [
    line
    for text in (
        *(step.get("run", "") for step in steps()),
        *re.findall(r"^    (optfuse .*)$", DOCS, re.MULTILINE),
    )
    for line in text.splitlines()
    if line.startswith("optfuse ")
]


def test_the_workflow_is_one_that_github_runs() -> None:
    assert set(workflow()) == {"name", "on", "permissions", "jobs"}
    assert set(workflow()["on"]) == {"push", "pull_request"}
    assert workflow()["permissions"] == {"contents": "read"}
    for step in steps():
        assert ("run" in step) != ("uses" in step)
        assert set(step) <= {"name", "if", "run", "uses", "with", "working-directory"}


def test_it_exports_gates_and_uploads() -> None:
    verbs = [line.split()[1] for step in steps() for line in step.get("run", "").splitlines()]
    order = [verb for verb in verbs if verb in ("optimize", "check", "report")]
    assert order == ["optimize", "check", "optimize", "check", "report"]
    # What was found is kept also where the gate failed.
    for step in steps()[-2:]:
        assert step["if"] == "${{ !cancelled() }}"
    [page] = [line for line in COMMANDS if line.startswith("optfuse report")]
    assert shlex.split(page)[-1] in steps()[-1]["with"]["path"].split()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_and_its_model_is_there(command: str) -> None:
    words = shlex.split(command)[1:]
    # Options are checked before --help answers, and nothing runs.
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    for word in words:
        if word.startswith("models/"):
            assert (ROOT / word.split(":")[0]).is_file()


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("optfuse check")])
def test_its_limits_can_be_checked(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, found in (("resnet50", report()), ("base", report(median_ms=9.0))):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "report.json").write_text(dump(found), encoding="utf-8")
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


def test_the_file_of_the_docs_is_read(tmp_path: Path) -> None:
    [text] = re.findall(r"^    \[tool\.optfuse\.check\].*\n(?:    .*\n)+", DOCS, re.MULTILINE)
    path = tmp_path / "pyproject.toml"
    path.write_text(re.sub(r"^    ", "", text, flags=re.MULTILINE), encoding="utf-8")
    found = settings(Limits(), file=path)
    assert found.limits == Limits(max_drift_ratio=2, min_speedup=1, max_slowdown=1.05)
    assert found.baseline == tmp_path / "ci" / "report.json"
    assert (found.engines, found.strict) == (("onnxruntime",), True)


def test_the_docs_name_every_limit() -> None:
    every = Limits(0.1, 1.0, 0.9, 1.0, 1.0, 1, 1)
    listed = re.findall(r"^\| `(--[a-z0-9-]+) ", DOCS, re.MULTILINE)
    assert listed == list(map(option, every.given()))
