"""`optfuse optimize` with a precision, with open dimensions, and with --engine auto."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from typer.testing import CliRunner, Result

from models import digits
from optfuse import backends
from optfuse.cli import app
from optfuse.report import schema

ROOT = Path(__file__).parent.parent
SOURCE = f"{ROOT / 'models' / 'digits.py'}:build"
DATA = str(digits.HELD_OUT)


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def optimized(folder: Path, *arguments: str) -> Mapping[str, Any]:
    """The report of a run on ONNX Runtime, unless another engine is named; it can be read again."""
    engine = [] if "--engine" in arguments else ["--engine", "onnxruntime"]
    time = [] if "--duration" in arguments else ["--duration", "0"]
    given = ["optimize", SOURCE, "--output", str(folder), "--threads", "1", *engine, *time]
    result = typed(*given, *arguments)
    assert result.exit_code == 0, result.stderr
    return schema.parse((folder / "report.json").read_text()).document


def elements(path: Path) -> set[str]:
    """The types of the weights of an ONNX file."""
    held = onnx.load(path).graph.initializer
    return {TensorProto.DataType.Name(each.data_type) for each in held if len(each.dims) > 1}


def test_int8_is_calibrated_on_half_of_the_data_and_judged_on_the_other(tmp_path: Path) -> None:
    document = optimized(tmp_path, "--precision", "int8", "--data", DATA)
    assert document["precision"]["calibration"] == "ranges from 256 samples of the data"
    assert document["settings"]["precision"] == "int8"
    assert "INT8" in elements(tmp_path / "model.onnx")
    assert elements(tmp_path / "baseline.onnx") == {"FLOAT"}
    [baseline, ours] = document["drift"]
    # 8 bits in 20 layers, on real images: about 0.027, and float32's own 3e-7.
    assert baseline["relative_l2"] < 1e-5 < 1e-3 < ours["relative_l2"] < 0.1
    # A prediction that int8 turns over is one in a few hundred; at most one of 64 is here.
    assert ours["top1_agreement"] >= 63 / 64
    printed = " ".join(typed("report", str(tmp_path)).stdout.split())
    assert (
        "samples of the data (of 896: every other one, and at most 256, evenly spread)" in printed
    )
    assert "(of 896: every other one, and at most 64, evenly spread)." in printed
    assert "precision int8: 15 of 15 layers in int8, inputs and outputs in fp32" in printed
    assert "relative L2, top-1 equal" in printed


def test_a_mixture_shows_its_curve_and_its_choice(tmp_path: Path, short_rounds: None) -> None:
    document = optimized(
        tmp_path,
        *("--precision", "mixed", "--max-drift", "0.02", "--data", DATA, "--duration", "1"),
    )
    told = document["precision"]
    assert (told["low"], told["timed_on"]) == ("int8", "onnxruntime")
    [chosen] = [point for point in told["curve"] if point["chosen"]]
    assert chosen["relative_l2"] <= 0.02
    assert {each["module"] for each in told["sensitivities"]} >= {"stem.activation", "classifier"}
    printed = typed("report", str(tmp_path)).stdout
    assert "Drift against the share of layers in low precision" in printed
    assert "What each layer costs in low precision" in printed
    assert "residual.layers.0.activation" in printed
    page = tmp_path / "page.html"
    assert typed("report", str(tmp_path), "--html", str(page)).exit_code == 0
    assert "Drift against the share of layers in low precision" in page.read_text()


def test_fp16_has_its_inputs_too_where_that_is_asked(tmp_path: Path) -> None:
    document = optimized(tmp_path, "--precision", "fp16", "--io-precision", "fp16")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    [widened] = [each for each in document["warnings"] if each["kind"] == "widened"]
    assert widened["finding"] == "ONNX Runtime computes fp16 in float32 on a CPU"
    # 11 bits of mantissa: 5e-4 a rounding, and 20 layers of it.
    assert 1e-5 < document["drift"][1]["relative_l2"] < 1e-2


def test_an_engine_without_that_precision_is_refused_by_name_and_left_out_else(
    tmp_path: Path,
) -> None:
    named = typed(
        *("optimize", SOURCE, "--precision", "bf16", "--engine", "onnxruntime"),
        *("--output", str(tmp_path / "out")),
    )
    assert named.exit_code == 4
    assert "cannot run the model in bf16" in named.stderr
    assert "no convolution and no matrix product in bf16" in named.stderr
    assert not (tmp_path / "out").exists()


def test_random_calibration_is_a_warning_in_the_report(tmp_path: Path) -> None:
    document = optimized(tmp_path, "--precision", "int8", "--random-calibration")
    assert "random-calibration" in [each["kind"] for each in document["warnings"]]
    assert document["precision"]["calibration"].endswith("random inputs")


def test_auto_recommends_from_what_it_measured(
    tmp_path: Path, short_rounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch-compile is among them and compiles for half a minute: it has tests of its own.
    few = {name: backends.BACKENDS[name] for name in ("torch", "onnxruntime")}
    monkeypatch.setattr(backends, "BACKENDS", few)
    document = optimized(tmp_path, "--engine", "auto", "--duration", "1")
    found = document["recommendation"]
    assert {each["engine"] for each in found["candidates"]} == set(few)
    medians = [each["median_ms"] for each in found["candidates"]]
    assert medians == sorted(medians)
    printed = typed("report", str(tmp_path)).stdout
    assert f"on {found['engine']}." in " ".join(printed.split())
    assert "Recommendation" in printed


def test_what_a_builder_does_by_itself_is_in_the_report(tmp_path: Path) -> None:
    backend = backends.get("tensorrt-rtx")
    if reason := backend.unavailable():
        pytest.skip(reason)
    document = optimized(tmp_path, "--engine", "tensorrt-rtx", "--target", "sm_89")
    found = {each["rewrite"]: each for each in document["builder_findings"]}
    fused = found["activation into convolution"]
    assert fused["counts"]["places"] >= 13
    assert fused["verdict"] in ("yes", "partly")
    assert "does by itself" in typed("report", str(tmp_path)).stdout
    engines = sorted(path.name for path in (tmp_path / "engines" / "tensorrt-rtx").iterdir())
    assert engines == [
        f"sm_89.{variant}.engine{suffix}"
        for variant in ("baseline", "optimized")
        for suffix in ("", ".json")
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--engine", "auto", "--engine", "nosuch"], 2, ["nosuch"]),
        (["--target", "sm_89"], 2, ["nothing to build", "tensorrt-rtx"]),
        (["--hardware-compatible"], 2, ["None of the engines of this run builds files"]),
        (["--precision", "fp16", "--low-precision", "int8"], 2, ["low layers of a mixture"]),
        (["--precision", "fp16", "--random-calibration"], 2, ["Nothing is calibrated for fp16"]),
        (["--precision", "int8", "--random-calibration", "--data", "nan.npz"], 2, ["--data"]),
        (["--precision", "int4"], 2, ["int4", "fp32, fp16, bf16, int8, mixed"]),
        (["--precision", "int8"], 2, ["no data to take them from", "--random-calibration"]),
        (["--precision", "mixed"], 2, ["needs a limit", "--max-drift"]),
        (["--max-drift", "0.1"], 2, ["--precision mixed"]),
        (["--precision", "fp16", "--ablate"], 2, ["--ablate measures passes in float32"]),
        (["--precision", "fp16", "--io-precision", "bf16"], 2, ["fp32 or fp16"]),
        (["--precision", "int8", "--data", "nowhere.npz"], 3, ["nowhere.npz", "no such file"]),
        (["--precision", "int8", "--data", "wrong.npz"], 2, ["wrong.npz"]),
        (["--precision", "int8", "--data", "equal.npz"], 2, ["samples are equal"]),
        (["--precision", "int8", "--data", "nan.npz"], 2, ["NaN"]),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 16, (4, 1, 8, 8)).astype(np.float32)
    np.savez("wrong.npz", input=images[:, :, :7])
    np.savez("equal.npz", input=np.repeat(images[:1], 4, axis=0))
    images[1, 0, 0, 0] = np.nan
    np.savez("nan.npz", input=images)
    result = typed("optimize", SOURCE, "--engine", "onnxruntime", "--output", "out", *arguments)
    assert result.exit_code == code, result.stderr
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.glob("out/*")] == []


def test_a_run_that_fails_leaves_the_earlier_one_and_one_that_works_takes_its_place(
    tmp_path: Path,
) -> None:
    optimized(tmp_path, "--precision", "int8", "--data", DATA, "--engine", "openvino,onnxruntime")
    stale = tmp_path / "engines" / "tensorrt-rtx" / "sm_89.optimized.engine"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another model")
    own = [tmp_path / each for each in ("model.v2.onnx", "mine.onnx.data", "engines/mine/x.engine")]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"the user's own")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / "model.onnxruntime.onnx" in before
    equal = tmp_path.parent / f"{tmp_path.name}-equal.npz"
    np.savez(equal, input=np.ones((4, 1, 8, 8), np.float32))
    failed = typed(
        *("optimize", SOURCE, "--engine", "onnxruntime", "--output", str(tmp_path)),
        *("--precision", "int8", "--data", str(equal)),
    )
    assert failed.exit_code == 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    optimized(tmp_path, "--precision", "fp16")
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    results = {tmp_path / each for each in ("baseline.onnx", "model.onnx")}
    assert left == {*own, *results, tmp_path / "report.json", tmp_path / "report.md"}


def test_a_limit_out_of_reach_is_an_error_beside_the_report(tmp_path: Path) -> None:
    result = typed(
        *("optimize", SOURCE, "--engine", "onnxruntime", "--output", str(tmp_path)),
        *("--precision", "mixed", "--max-drift", "1e-12", "--duration", "0"),
    )
    assert result.exit_code == 1
    assert "No mixture of 'digits' stays within --max-drift 1e-12" in result.stderr
    assert schema.parse((tmp_path / "report.json").read_text())


def test_a_single_sample_is_doubted(tmp_path: Path) -> None:
    with np.load(digits.HELD_OUT) as arrays:
        np.savez(tmp_path / "one.npz", input=arrays["input"][:1])
    document = optimized(
        tmp_path / "out", "--precision", "int8", "--data", str(tmp_path / "one.npz")
    )
    [few] = [each for each in document["warnings"] if each["kind"] == "few-samples"]
    assert few["finding"] == "Its ranges come from 1 sample, which drift is taken on as well"


def test_a_model_that_nothing_can_be_low_in_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "net_of_precision_tests.py"
    source.write_text("from torch import nn\ndef build():\n    return nn.Softmax(1)\n")
    result = typed(
        *("optimize", f"{source}:build", "--input", "2x8", "--engine", "onnxruntime"),
        *("--precision", "fp16", "--output", str(tmp_path / "out")),
    )
    assert result.exit_code == 2
    assert "Nothing of the model can be written in fp16" in result.stderr
