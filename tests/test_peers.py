"""The benchmark against peers: what its page says of known rows, and that it goes on."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import page, run
from benchmarks.peers.contenders import ALL, OURS, REFERENCE, Contender

main = importlib.import_module("benchmarks.peers.__main__")


def entry(contender: Contender, ratio: float, **other: Any) -> dict[str, Any]:
    return {
        "by": contender.by,
        "engine": contender.engine,
        "precision": contender.precision,
        "median_ms": 10.0 / ratio,
        "ratio": [ratio, ratio * 0.99, ratio * 1.01],
        "verdict": "reference" if contender == REFERENCE else "faster",
        "relative_l2": 1e-6,
        "top1": 1.0,
        "share": 0.5,
        **other,
    }


def network(ratio: float) -> dict[str, Any]:
    ours = Contender("optfuse", "openvino", "bf16")
    missing = [
        {"by": "optfuse", "engine": engine, "precision": "int8", "missing": "it has no int8"}
        for engine in ("torch", "torch-compile")
    ]
    return {
        "outcome": "measured",
        "noise_floor": 1.01,
        "caveats": ["this machine: it was busy."],
        "contenders": [entry(REFERENCE, 1.0), entry(ours, ratio, top1=None), *missing],
        "seconds": 12.0,
    }


ACCURACY = [
    {
        "by": "optfuse",
        "engine": "onnxruntime",
        "precision": "int8",
        "images": 400,
        "correct": 396,
        "top1": 0.9975,
        "relative_l2": 2.5e-2,
    }
]


def test_no_two_contenders_share_a_name_and_every_precision_is_there() -> None:
    assert len({each.name for each in ALL}) == len(ALL)
    assert {each.precision for each in OURS} == {"fp32", "bf16", "fp16", "int8"}
    assert REFERENCE in ALL


def test_the_page_has_ratios_verdicts_drift_and_what_is_missing() -> None:
    crashed = {"outcome": "crashed", "why": "exit code -11: no message"}
    rows = {"googlenet, batch 1": network(2.0), "unet, batch 1": network(8.0), "x": crashed}
    text = page.page(rows, ACCURACY, "One thread of a CPU.")
    assert "| optfuse | openvino | bf16 | 4.00x | 2.00x | 8.00x | 2 |" in text  # sqrt(2 * 8)
    assert (
        "| optfuse | openvino | bf16 | 5 | 2.00x [1.98, 2.02] | faster | 1.0e-06 |  | 50% |" in text
    )
    # The reference is not compared with itself over all of them.
    assert text.count("| export as it comes | onnxruntime | fp32 |") == 2
    assert "- optfuse torch int8, optfuse torch-compile int8: it has no int8." in text
    assert "Noise floor 1.010x.\n\n- this machine: it was busy.\n\n|" in text
    assert "## x\n\nNot measured: exit code -11: no message." in text
    assert "These are 400 images" in text
    assert "| optfuse | onnxruntime | int8 | 99.00% | 99.75% | 2.5e-02 |" in text
    whole = json.loads(page.document(rows, ACCURACY, "One thread of a CPU."))
    assert whole["networks"]["googlenet, batch 1"]["noise_floor"] == 1.01


def test_progress_names_the_best_of_theirs_and_of_ours() -> None:
    line = page.progress("googlenet 1", network(2.0))
    assert line == (
        "googlenet 1: export as it comes onnxruntime fp32 1.00x [0.99, 1.01]; "
        "optfuse openvino bf16 2.00x [1.98, 2.02], 12 s"
    )


def test_a_run_that_was_stopped_goes_on_and_only_a_whole_one_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def row(name: str) -> dict[str, Any]:
        asked.append(name)
        return network(2.0)

    for name in ("FILE", "MARKDOWN", "DOCUMENT"):
        monkeypatch.setattr(main, name, tmp_path / name)
    monkeypatch.setattr(main, "_in_a_process", row)
    monkeypatch.setattr(main, "NETWORKS", ("googlenet", "unet"))
    monkeypatch.setattr(main, "PACKAGES", ("torch",))
    monkeypatch.setattr(main.accuracy, "rows", lambda: ACCURACY)
    assert main.main(["--only", "googlenet *"]) == 0
    assert asked == ["googlenet 1", "googlenet 8"]
    assert not (tmp_path / "MARKDOWN").exists()
    assert main.main([]) == 0
    assert asked == ["googlenet 1", "googlenet 8", "unet 1", "unet 8"]
    assert "## unet, batch 8" in (tmp_path / "MARKDOWN").read_text()
    assert "[4/4] unet 8" in capsys.readouterr().out
    assert main.main(["--fresh", "--only", "unet 1"]) == 0
    assert asked[4:] == ["unet 1"]


def test_a_network_is_measured_and_what_cannot_run_says_why() -> None:
    none = Contender("optfuse", "torch", "int8")
    ours = Contender("optfuse", "onnxruntime", "int8")
    row = run.run("digits", 2, 0.3, [ours, none])
    first, second, third = row["contenders"]
    assert (first["by"], first["ratio"], first["verdict"]) == (
        "export as it comes",
        [1.0, 1.0, 1.0],
        "reference",
    )
    assert second["precision"] == "int8"
    # 8 bits in 20 layers, on images that are noise: between what float32 and 4 bits would leave.
    assert 1e-4 < second["relative_l2"] < 0.3
    assert second["ratio"][1] <= second["ratio"][0] <= second["ratio"][2]
    assert "int8 is written into ONNX files only" in third["missing"]


def test_what_is_far_too_slow_is_left_out_with_its_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Contender("optfuse", "onnxruntime", "fp32")
    monkeypatch.setattr(run, "TOO_SLOW", 1e-9)
    row = run.run("digits", 2, 0.3, [ours])
    assert [("ratio" in each) for each in row["contenders"]] == [True, False]
    assert re.fullmatch(
        r"a run takes about \d+ times as long as the reference's", row["contenders"][1]["missing"]
    )
