"""`optfuse diff` as a user types it: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from optfuse import backends
from optfuse.cli import app
from optfuse.report import schema

MODEL = """
import torch
from torch import nn

print("the model's own chatter")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        x = torch.relu(self.middle(torch.relu(self.stem(image))))
        return self.head(x.mean((2, 3)))


def build():
    return Net()


def planted():
    net = Net()
    with torch.no_grad():
        net.middle.weight.mul_(1.01)
    return net


def example_inputs():
    return (torch.randn(2, 3, 8, 8),)
"""

RESNET = """
import torch
from models import resnet50

example_inputs = resnet50.example_inputs
MIDDLE = "features.stage3_block3.layers.convolve.conv"


def planted(change):
    net = resnet50.build()
    with torch.no_grad():
        change(dict(net.named_modules())[MIDDLE].weight.view(-1))
    return net


def whole():
    return planted(lambda weight: weight.mul_(1.01))


def single():
    return planted(lambda weight: weight[weight.abs().argsort()[len(weight) // 2]].mul_(1.01))
"""

NET = "net_of_cli_diff_tests.py:build"
PLANTED = "net_of_cli_diff_tests.py:planted"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with one model in it, as the current folder."""
    (tmp_path / "net_of_cli_diff_tests.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(*arguments: str) -> Result:
    # Wide enough that no sentence of the headline is broken.
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["diff", *arguments, "--threads", "1"])


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """The exit code; thing, cause and next step on stderr; nothing on stdout, no traceback."""
    assert result.exit_code == code, result.stderr
    for part in parts:
        assert part in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_it_prints_distances_and_tolerances(folder: Path) -> None:
    result = typed(NET)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("net_of_cli_diff_tests@torch: relative L2 ")
    assert "Tolerances that would pass" in result.stdout
    assert "chatter" not in result.stdout


def test_a_planted_wrong_layer_is_named_and_the_exit_code_is_0_all_the_same(folder: Path) -> None:
    result = typed(NET, PLANTED, "--per-layer")
    assert result.exit_code == 0, result.stderr
    assert "the first layer to drift is conv2d_1 (middle): it adds " in result.stdout
    assert "conv2d_1 (suspect)" in result.stdout


def test_the_optimized_program_is_compared_layer_by_layer(folder: Path) -> None:
    result = typed(NET, "--passes", "all", "--per-layer")
    assert result.exit_code == 0, result.stderr
    assert "net_of_cli_diff_tests optimized@torch: no layer is to blame" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("conv_act_1"))
    assert line.split()[:3] == ["conv_act_1", "relu_1", "middle"]


def test_json_is_the_document_and_nothing_else(folder: Path) -> None:
    result = typed(NET, "--samples", "3", "--json")
    document = json.loads(result.stdout)
    jsonschema.validate(document, schema.json_schema("diff"))
    assert len(document["compared"][0]["samples"]) == 3
    assert document["settings"]["threads"] == 1


def test_reports_are_written_and_quiet_prints_nothing(folder: Path) -> None:
    result = typed(
        *(NET, "--passes", "all", "--per-layer", "--quiet"),
        *("--export-json", "a/d.json", "--export-markdown", "a/d.md"),
    )
    assert (result.exit_code, result.stdout) == (0, "")
    report = schema.parse(Path("a/d.json").read_text())
    assert report.document["compared"][1]["layers"]["rows"]
    assert Path("a/d.md").read_text().startswith("# net_of_cli_diff_tests@torch: relative L2")


def test_a_users_own_inputs(folder: Path) -> None:
    image = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    np.savez("mine.npz", image=image)
    result = typed(NET, "--data", "mine.npz")
    assert result.exit_code == 0, result.stderr
    assert "(from mine.npz, 2 samples; the worst is shown)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ([NET, "--data", "nowhere.npz"], 3, ["nowhere.npz", "no such file"]),
        ([NET, "--data", "mine.csv"], 2, ["mine.csv", ".safetensors"]),
        ([NET, "--data", "cut.npz"], 3, ["cut.npz", "cut short or of another kind"]),
        ([NET, "--data", "wrong.npz"], 2, ["1x3x8x8 float32", "2x3x8x8 float32"]),
        ([NET, "--data", "cut.npz", "--samples", "2"], 2, ["--data and --samples"]),
        ([NET, "--samples", "0"], 2, ["--samples"]),
        (["nowhere.onnx"], 3, ["nowhere.onnx"]),
        (["empty.onnx"], 3, ["empty.onnx"]),
        ([f"{NET}@nothing"], 2, ["nothing", "onnxruntime"]),
        (["net_of_cli_diff_tests.py:built"], 3, ["built"]),
        ([NET, "--passes", "fold_bn"], 2, ["fold_bn"]),
        ([NET, "--input", "1x4x8x8"], 3, ["--input"]),
        ([NET, "--export-json", "net_of_cli_diff_tests.py/d.json"], 6, ["d.json"]),
    ],
)
def test_bad_input_is_one_sentence_each_for_thing_cause_and_next_step(
    folder: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    Path("cut.npz").write_bytes(b"PK\x03\x04")
    Path("empty.onnx").write_bytes(b"")
    np.savez("wrong.npz", image=np.ones((1, 3, 8, 8), dtype=np.float32))
    result = typed(*arguments)
    if "--export-json" in arguments:
        parts = ["A file stands where a folder should be"]
    assert_refused(result, code, *parts)


def test_debug_shows_where_an_error_came_from(folder: Path) -> None:
    assert "Traceback" in typed("nowhere.onnx", "--debug").stderr


# The real thing


@pytest.mark.parametrize("planted", ["whole", "single"])
def test_a_wrong_layer_in_the_middle_of_resnet50_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """One weight tensor scaled by 1.01; and one single weight, the median of 589,824."""
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root))
    (folder / "planted_resnet50.py").write_text(RESNET)
    original = f"{root / 'models/resnet50.py'}:build"
    result = typed(original, f"planted_resnet50.py:{planted}", "--per-layer", "--json")
    assert result.exit_code == 0, result.stderr
    (_, wrong) = json.loads(result.stdout)["compared"]
    layers = wrong["layers"]
    (row,) = [each for each in layers["rows"] if each["name"] == layers["suspect"]]
    assert row["module"] == "features.stage3_block3.layers.convolve.conv"
    # Every other layer does what the original does, to the last bit.
    assert all(each["growth"] <= 1.0 for each in layers["rows"] if each is not row)
    sample = wrong["samples"][0]
    if planted == "whole":
        assert row["growth"] > 10_000
        assert sample["ratio_to_own"] > 100
    else:
        # The output alone would not tell: it is about as far off as float32 itself.
        assert row["growth"] > layers["limit"]
        assert sample["ratio_to_own"] < 2


@pytest.mark.skipif(
    backends.get("onnxruntime").unavailable() is not None,
    reason=str(backends.get("onnxruntime").unavailable()),
)
@pytest.mark.parametrize("name", ["baseline.onnx", "model.onnx"])
def test_a_wrong_layer_in_an_exported_file_is_named(folder: Path, name: str) -> None:
    import onnx
    from onnx import numpy_helper

    done = CliRunner().invoke(
        app,
        ["optimize", NET, "--engine", "onnxruntime", "--duration", "0", "--output", "out"],
    )
    assert done.exit_code == 0, done.stderr
    model = onnx.load(f"out/{name}")
    node = [each for each in model.graph.node if each.op_type == "Conv"][1]
    (weight,) = [each for each in model.graph.initializer if each.name == node.input[1]]
    wrong = numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(numpy_helper.from_array(wrong, weight.name))
    onnx.save(model, "planted.onnx")
    result = typed(NET, "planted.onnx", "--per-layer", "--json")
    row = json.loads(result.stdout)["compared"][1]
    layers = {each["name"]: each for each in row["layers"]["rows"]}
    assert layers[row["layers"]["suspect"]]["module"] == "middle"
    assert layers["linear"]["equals"] == ["linear"], "layers behind it are known too"
    assert row["layers"]["engine"] == "onnxruntime"
    assert math.isfinite(row["samples"][0]["relative_l2"])
