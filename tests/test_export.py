"""What is written: the export as it comes beside ours, whole files, names, types, big models."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from optfuse import backends
from optfuse.compare import drift
from optfuse.errors import ExportError
from optfuse.export import export, export_baseline
from optfuse.float64 import run_float64
from optfuse.graph import ONNX_LAYERS
from optfuse.layers import LIMIT, compare_file
from optfuse.stages import Artifact, BuildOptions, Program
from tests.harness import captured, optimized, scramble


class Net(nn.Module):
    """Two inputs, a dict of outputs, and something for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 4, 1, bias=False)
        self.right = nn.Conv2d(6, 5, 1, bias=False)
        self.up = nn.ConvTranspose2d(9, 4, 2, stride=2, bias=False)

    def forward(self, image: torch.Tensor, gain: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return {"up": nn.functional.silu(self.up(x)) * gain, "mean": x.mean((2, 3))}


@pytest.fixture(scope="module")
def program() -> Program:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, 8, 8, generator=generator)
    return captured(scramble(Net()), image, torch.rand(1, generator=generator) + 0.5)


@pytest.fixture(scope="module")
def faster(program: Program) -> Program:
    return optimized(program, "all")


def outputs(artifact: Artifact, program: Program) -> list[torch.Tensor]:
    backend = backends.get("onnxruntime")
    if reason := backend.unavailable():
        pytest.skip(reason)
    with backend.open(artifact, BuildOptions()) as session:
        session.bind(program.example_args)
        session.run()
        return session.fetch()


def test_both_files_compute_what_the_program_does(
    program: Program, faster: Program, tmp_path: Path
) -> None:
    reference = run_float64(program.graph_module, program.example_args, {})
    baseline = export_baseline(program, tmp_path / "baseline.onnx")
    ours = export(faster, tmp_path / "model.onnx")
    for artifact in (baseline, ours):
        onnx.checker.check_model(str(artifact.path), full_check=True)
        moved = drift(
            outputs(artifact, program),
            reference,
            engine="onnxruntime",
            variant=artifact.variant,
            reference_name="float64",
        )
        # float32 rounds at 6e-8 and the network is four layers deep.
        assert 0 < moved.relative_l2 < 3e-6


def test_every_convolution_of_ours_has_a_bias(faster: Program, tmp_path: Path) -> None:
    graph = onnx.load(export(faster, tmp_path / "model.onnx").path).graph
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert [len(node.input) for node in convolutions] == [3, 3, 3]
    assert {node.domain for node in graph.node} == {""}


def test_names_are_the_ones_asked_for(faster: Program, tmp_path: Path) -> None:
    artifact = export(
        faster, tmp_path / "model.onnx", input_names=("photo", "factor"), output_names=("a", "b")
    )
    graph = onnx.load(artifact.path).graph
    assert artifact.input_names == ("photo", "factor")
    assert [each.name for each in graph.input] == ["photo", "factor"]
    assert artifact.output_names == ("a", "b")
    assert [each.name for each in graph.output] == ["a", "b"]


def test_the_artifact_describes_the_file(faster: Program, tmp_path: Path) -> None:
    artifact = export(faster, tmp_path / "model.onnx")
    content = artifact.path.read_bytes()
    assert artifact.sha256 == hashlib.sha256(content).hexdigest()
    assert artifact.size_bytes == len(content)
    assert artifact.trace[: len(faster.trace)] == faster.trace
    assert artifact.trace[-1].stage == "export"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_large_parameters_lie_in_a_second_file(
    program: Program, faster: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = export(faster, tmp_path / "small.onnx")
    monkeypatch.setattr(import_module("optfuse.export"), "EMBED_LIMIT_BYTES", 100)
    artifact = export(faster, tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    # The stem's weight is 6x3x3x3 in float32; the smallest constants stay in the model's file.
    assert data.stat().st_size >= 4 * 6 * 3 * 3 * 3
    assert artifact.size_bytes == artifact.path.stat().st_size + data.stat().st_size
    assert artifact.path.stat().st_size < small.size_bytes
    for ours, embedded in zip(outputs(artifact, program), outputs(small, program), strict=True):
        assert torch.equal(ours, embedded)


def test_a_second_file_of_an_earlier_export_goes_away(faster: Program, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"of a larger model")
    export(faster, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j1(x)

    with pytest.raises(ExportError) as caught:
        export_baseline(captured(Sorted(), torch.ones(3)), tmp_path / "baseline.onnx")
    assert caught.value.thing == "'test' cannot be exported to ONNX"
    assert "bessel_j1" in caught.value.cause
    assert list(tmp_path.iterdir()) == []


def _half_and_double(dtype: torch.dtype, folder: Path) -> tuple[Program, Artifact]:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    program = captured(scramble(net).to(dtype), torch.randn(1, 3, 6, 6).to(dtype))
    return program, export(optimized(program, "all"), folder / "model.onnx")


@pytest.mark.parametrize(
    ("dtype", "element_type"),
    [(torch.float16, onnx.TensorProto.FLOAT16), (torch.float64, onnx.TensorProto.DOUBLE)],
)
def test_other_dtypes_stay_what_they_are(
    dtype: torch.dtype, element_type: int, tmp_path: Path
) -> None:
    _, artifact = _half_and_double(dtype, tmp_path)
    graph = onnx.load(artifact.path).graph
    assert {each.data_type for each in graph.initializer} == {element_type}
    assert graph.output[0].type.tensor_type.elem_type == element_type


def test_a_half_model_computes_what_it_did(tmp_path: Path) -> None:
    program, artifact = _half_and_double(torch.float16, tmp_path)
    [given] = outputs(artifact, program)
    [reference] = run_float64(program.graph_module, program.example_args, {})
    # Weights and result are rounded to 11 bits, 5e-4 each.
    assert torch.linalg.norm(given.double() - reference) <= 2e-3 * torch.linalg.norm(reference)


def layers_in(artifact: Artifact) -> dict[str, dict[str, list[str]]]:
    entries = onnx.load(artifact.path).metadata_props
    found: dict[str, dict[str, list[str]]] = json.loads(
        next(entry.value for entry in entries if entry.key == ONNX_LAYERS)
    )
    return found


def test_our_file_says_which_captured_node_each_value_stands_for(
    faster: Program, tmp_path: Path
) -> None:
    artifact = export(faster, tmp_path / "model.onnx")
    layers = layers_in(artifact)
    values = {name for node in onnx.load(artifact.path).graph.node for name in node.output}
    assert layers.keys() <= values
    equal = {name: each["equals"] for name, each in layers.items()}
    assert equal["conv_act"] == ["relu"]
    # Two convolutions in one, whose result is what the concat gave.
    assert ["cat"] in equal.values()
    assert ["silu"] in equal.values()
    assert layers["conv_act"]["origins"][0] == "conv2d"
    assert "custom" not in {entry.key for entry in onnx.load(artifact.path).metadata_props}


def test_results_of_a_split_are_told_apart(program: Program, tmp_path: Path) -> None:
    combined = optimized(program, "combine_parallel_convs")
    equal = [each["equals"] for each in layers_in(export(combined, tmp_path / "m.onnx")).values()]
    assert ["relu_1"] in equal
    assert ["relu_2"] in equal


def test_an_output_keeps_its_node_whatever_it_is_called(tmp_path: Path) -> None:
    """Even by the name of another node, as a node of the original may be called in ours."""

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().cos().sin()

    program = captured(Twice(), torch.randn(4))
    artifact = export(optimized(program, "all"), tmp_path / "m.onnx", output_names=["cos"])
    model = onnx.load(artifact.path)
    onnx.checker.check_model(model)  # which asks for each name to be given once
    equal = {name: each["equals"] for name, each in layers_in(artifact).items()}
    assert equal == {"sin": ["sin"], "cos_inner_1": ["cos"], "cos": ["sin_1"]}
    (given,) = outputs(artifact, program)
    # 1e-6: three sines in float32.
    assert torch.allclose(given, program.example_args[0].sin().cos().sin(), rtol=0, atol=1e-6)


def test_the_export_as_it_comes_says_nothing(program: Program, tmp_path: Path) -> None:
    artifact = export_baseline(program, tmp_path / "baseline.onnx")
    assert not onnx.load(artifact.path).metadata_props


@pytest.mark.parametrize("passes", ["all", "combine_parallel_convs", "none"])
def test_what_it_says_is_what_the_values_are(program: Program, tmp_path: Path, passes: str) -> None:
    if reason := backends.get("onnxruntime").unavailable():
        pytest.skip(reason)
    artifact = export(optimized(program, passes), tmp_path / "model.onnx")
    feeds = list(program.example_args)
    found = compare_file(program, artifact.path, program.example_args, {}, feeds)
    assert len(found.rows) >= 5
    # A value that stood for another one would be off by about its own size.
    assert found.suspect is None
    assert max(row.growth or 0.0 for row in found.rows) < LIMIT / 2
