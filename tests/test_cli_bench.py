"""`optfuse bench` as a user types it: what it prints, what it leaves, how it exits."""

from __future__ import annotations

import csv
import importlib
import io
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from optfuse.cli import app
from optfuse.errors import EngineError
from optfuse.report import schema
from optfuse.roofline import Ceilings

MODEL = """
import torch
from torch import nn

print("the model's own chatter")

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))

def example_inputs():
    return torch.randn(1, 3, 8, 8)
"""

TWO = ("net.py:build", "net.py:build@onnxruntime")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    known = Ceilings(100.0, 10.0, 1, "cpu", "a processor", "2.0", "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr(
        importlib.import_module("optfuse.bench"), "ceilings", lambda *_args, **_options: known
    )
    return tmp_path


def run(*words: str, width: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(
        app, ["bench", *words, "--duration", "0.5", "--warmup", "1", "--threads", "1"]
    )


@pytest.mark.parametrize("width", [80, 120])
def test_it_prints_latencies_ratios_and_the_roofline(folder: Path, width: int) -> None:
    result = run(*TWO, width=width)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("net@onnxruntime ")
    assert "the model's own chatter" not in result.stdout
    for heading in ("Latency", "Speed-up", "Roofline"):
        assert heading in lines
    # The command at the end is one line, to be copied, however wide it is.
    assert all(len(line) <= width for line in lines if not line.startswith("$ "))


def test_json_alone_is_on_standard_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/optfuse", "bench", "net.py:build"])
    result = run("net.py:build", "--json")
    document = json.loads(result.stdout)
    assert document["kind"] == "bench"
    assert document["command"] == "optfuse bench net.py:build"


def test_it_writes_what_it_is_asked_for(folder: Path) -> None:
    result = run(
        *TWO, "--quiet", "--batch", "1,2", "--export-json", "a/b.json",
        "--export-markdown", "b.md", "--export-csv", "b.csv",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "")
    document = schema.parse((folder / "a" / "b.json").read_text(encoding="utf-8")).document
    assert [run["batch"] for run in document["runs"]] == [1, 2]
    assert (folder / "b.md").read_text(encoding="utf-8").startswith("# batch 1: net@onnxruntime ")
    rows = list(csv.DictReader(io.StringIO((folder / "b.csv").read_text(encoding="utf-8"))))
    assert [(row["batch"], row["name"]) for row in rows] == [
        ("1", "net@torch"),
        ("1", "net@onnxruntime"),
        ("2", "net@torch"),
        ("2", "net@onnxruntime"),
    ]
    for row, latency in zip(
        rows, [each for run in document["runs"] for each in run["latency"]], strict=True
    ):
        assert float(row["median_ms"]) == latency["median_ms"]
    assert [row["verdict"] != "" for row in rows] == [False, True, False, True]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("nothing",), 2, "There is no such file or folder"),
        (("net.py:build@nosuch",), 2, "There is no engine 'nosuch'"),
        (("gone.onnx",), 3, "There is no such file"),
        (("net.py:build", "--batch", "0"), 2, "'0' is no whole number above 0"),
        (("net.py:build", "--batch", "1;2"), 2, "'1;2' is no whole number above 0"),
        (("net.py:build@tensorrt",), 4, "cannot be run here"),
        (("net.py:build", "--input", "1x3x8"), 3, "cannot be captured"),
    ],
)
def test_bad_input_is_a_sentence_and_an_exit_code(
    folder: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    result = run(*words)
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_an_engine_that_fails_leaves_the_others_and_exits_with_4(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optfuse import backends

    def fails(*_args: object) -> None:
        raise EngineError("The engine 'onnxruntime' cannot load it", "It is broken", "Mend it")

    monkeypatch.setattr(type(backends.get("onnxruntime")), "open", fails)
    result = run(*TWO)
    assert result.exit_code == 4
    assert "net@onnxruntime not measured: It is broken" in result.stdout
    assert "Mend it" in result.stderr
