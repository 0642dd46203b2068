"""A process for each: it gives the same samples, errors and ends as one would here."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from optfuse.errors import EngineError, LoadError
from optfuse.feeds import feeds_of
from optfuse.isolated import Isolated, Job
from optfuse.measure import Schedule, interleave
from optfuse.stages import Artifact
from optfuse.subjects import opened_by, parse_subjects

MODEL = """
import os, sys
import torch
from torch import nn

print("chatter on standard output")

def build():
    if os.environ.get("CRASH"):
        raise ValueError("not today")
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def example_inputs():
    return torch.randn(1, 3, 8, 8)
"""

QUICK = Schedule(budget_seconds=0.5, min_blocks=8, max_blocks=8, block_ms=1, warmup_ms=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def job(text: str, folder: Path) -> Job:
    [subject] = parse_subjects([text])
    thing = opened_by(subject, folder)
    torch.save(feeds_of(thing), folder / "feeds.pt")
    artifact = thing if isinstance(thing, Artifact) else None
    return Job(subject, artifact, None, folder / "feeds.pt", threads=1)


def test_programs_and_files_are_timed_in_processes_of_their_own(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        Isolated(job("net.py:build", folder)) as program,
        Isolated(job("net.py:build@onnxruntime", folder)) as file,
    ):
        assert (program.device, file.device) == ("cpu", "cpu")
        found = interleave([("torch", "a", program), ("onnxruntime", "b", file)], schedule=QUICK)
    assert [(each.engine, each.variant, len(each.blocks)) for each in found] == [
        ("torch", "a", 8),
        ("onnxruntime", "b", 8),
    ]
    assert all(sample > 0 for each in found for sample in each.samples_ms)
    # Standard output belongs to the report; the model's chatter in the process goes elsewhere.
    printed = capfd.readouterr()
    assert "chatter" in printed.err


def test_an_error_in_the_process_is_the_error_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = job("net.py:build", folder)
    monkeypatch.setenv("CRASH", "1")
    with pytest.raises(LoadError, match="not today"):
        Isolated(ready)


def killed(connection: Connection, _job: Job) -> None:
    connection.send(("cpu", None))
    connection.recv()
    os.kill(os.getpid(), signal.SIGSEGV)


def gone_at_once(_connection: Connection, _job: Job) -> None:
    os._exit(3)


def test_a_crash_is_a_sentence(folder: Path) -> None:
    ready = job("net.py:build", folder)
    with Isolated(ready, serve=killed) as crashing, pytest.raises(EngineError) as caught:
        crashing.block(3)
    assert str(caught.value) == (
        "The process of 'net@torch' ended while running it. It did not come back: signal 11, "
        "SIGSEGV. Run it alone with --in-process to see what it prints, or leave it out."
    )
    with pytest.raises(EngineError, match=r"ended while opening it.*exit code 3"):
        Isolated(ready, serve=gone_at_once)


def test_no_process_is_left_behind(folder: Path) -> None:
    import multiprocessing

    with Isolated(job("net.py:build", folder)):
        assert len(multiprocessing.active_children()) == 1
    assert multiprocessing.active_children() == []
