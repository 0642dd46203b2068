"""The proof on a GPU, as far as it goes without one: on CPU engines in the GPU's place."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import page, run
from benchmarks.gpu.run import NETWORKS, Prepared, prove, usable
from optfuse import backends
from optfuse.backends import onnx_runtime
from optfuse.backends.nvidia import gpu_count
from optfuse.errors import EngineError

main = importlib.import_module("benchmarks.gpu.__main__")

ROW = {
    "network": "resnet50",
    "engine": "torch-cuda",
    "device": "NVIDIA H200",
    "before_ms": 4.0,
    "after_ms": 2.0,
    "ratio": [2.0, 1.9, 2.1],
    "noise_floor": 1.01,
    "verdict": "faster",
    "against_eager": [2.0, 1.9, 2.1],
    "drift": [1e-6, 1.1e-6],
    "wrong": False,
}


def test_every_network_is_proved() -> None:
    assert {"googlenet", "vit_tiny", "digits", "yolo_neck"} <= set(NETWORKS)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared("digits", tmp_path_factory.mktemp("digits"), threads=1)


def test_a_row_tells_how_much_faster_and_how_far_from_float64(digits: Prepared) -> None:
    [row] = digits.rows(["onnxruntime"], 0.3, "torch")
    assert (row["network"], row["engine"], row["device"]) == ("digits", "onnxruntime", "cpu")
    low, high = row["ratio"][1:]
    assert 0 < low <= row["ratio"][0] <= high
    # A network of 20 layers of float32, whose rounding is 6e-8 each: far below 1e-5.
    assert all(0 < each < 1e-5 for each in row["drift"])
    assert row["wrong"] is False
    assert row["against_eager"][0] > 0


def test_an_engine_that_fails_costs_its_own_rows_alone(
    digits: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise EngineError("It cannot start", "Out of memory", "Free some")

    monkeypatch.setattr(onnx_runtime.CPU_BACKEND, "open", fails)
    rows = digits.rows(["torch", "onnxruntime"], 0.3, "torch")
    assert [row.get("failed") for row in rows] == [None, "Out of memory"]


def test_what_is_far_from_float64_is_wrong(
    digits: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "DRIFT_LIMIT", 0.0)
    monkeypatch.setattr(run, "RATIO_LIMIT", 0.0)
    [row] = digits.rows(["torch"], 0.3, "torch")
    assert row["wrong"] is True
    assert page.progress(row).endswith("WRONG")


def test_rounds_come_one_after_the_other_and_a_failure_is_a_row(
    digits: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(network: str, *_: Any) -> Prepared:
        if network == "broken":
            raise EngineError("It cannot be captured", "A branch", "Rewrite it")
        return digits

    def rows(_: Prepared, engines: list[str], seconds: float, eager: str) -> Any:
        yield from ({"network": "digits", "engine": engine} for engine in engines)

    monkeypatch.setattr(run, "Prepared", prepared)
    monkeypatch.setattr(Prepared, "rows", rows)
    found = list(prove(["digits", "broken"], [["a"], [], ["b"]], "a", 0.1, 1))
    assert [(row["network"], row["engine"], row.get("failed")) for row in found] == [
        ("digits", "a", None),
        ("broken", "a", "A branch"),
        ("digits", "b", None),
        ("broken", "b", "A branch"),
    ]


@pytest.mark.skipif(gpu_count() > 0, reason="there is a GPU here")
def test_without_a_gpu_it_says_why_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(main, "DOCUMENT", tmp_path / "gpu.json")
    monkeypatch.setattr(main, "MARKDOWN", tmp_path / "gpu.md")
    assert main.main([]) == 2
    printed = capsys.readouterr()
    here, skipped = usable(backends.ON_GPU)
    assert here == []
    for each in skipped:
        assert f"skipped {each.engine}: {each.reason}" in printed.out
    assert "nothing was written" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_it_ends_with_the_time_whatever_hangs() -> None:
    begun = time.monotonic()
    rows, ended = main.within(2.0, (["digits"], [["torch"]], "torch", 600.0, 1))
    assert (rows, ended) == ([], "the time was up")
    # It would have measured for ten minutes; ending a process takes a moment on a busy machine.
    assert time.monotonic() - begun < 60


def test_a_process_that_dies_is_told_from_one_that_is_late() -> None:
    _, ended = main.within(60.0, (["digits"], [["torch"]], "torch", "no number", 1))
    assert ended.startswith("the process ended with exit code")


def test_the_page_tells_what_ran_what_failed_and_what_did_not_run() -> None:
    machine = {
        "gpu": {"name": "NVIDIA H200", "driver": "570.1"},
        "cpu_model": "AMD EPYC",
        "versions": {"torch": "2.11.0", "tensorrt": None},
    }
    failed = {"network": "vit_tiny", "engine": "torch-cuda", "failed": "Out of memory"}
    rows: list[Any] = [ROW, failed, {**ROW, "network": "unet", "wrong": True}]
    missing = page.left_out(rows, ["resnet50", "digits"], ["torch-cuda"], "the time was up")
    text = page.page(
        {
            "environment": machine,
            "rows": rows,
            "skipped": [{"engine": "tensorrt", "reason": "The package tensorrt is not installed"}],
            "left_out": missing,
            "minutes": 7.5,
        }
    )
    assert "NVIDIA H200, driver 570.1; AMD EPYC. torch 2.11.0. It took 7.5 minutes." in text
    assert "2 runs: 2 faster, 0 undecided, 0 slower; 1 wrong, 1 failed." in text
    assert (
        "| resnet50 | 4.000 | 2.000 | 2.00x [1.90, 2.10] | faster | 1.010x | 2.00x [1.90, 2.10] "
        "| 1.0e-06 | 1.1e-06 |"
    ) in text
    assert "| vit_tiny | failed: Out of memory |" in text
    assert "| **wrong** |" in text
    assert "- tensorrt: The package tensorrt is not installed" in text
    assert "- torch-cuda: the time was up before digits" in text
    json.dumps(rows)
