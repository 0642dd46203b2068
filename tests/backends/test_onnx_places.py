"""Nodes of ONNX files that an engine's messages name, and the modules behind them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from optfuse.backends.onnx_places import external_data, file_sha256, place_in, place_of
from optfuse.export import export, export_baseline
from optfuse.files import sha256
from tests.harness import captured, optimized, scramble


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.head(self.stem(x).mean((2, 3)))
        return pooled


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The export as it comes, and ours."""
    folder = tmp_path_factory.mktemp("onnx")
    program = captured(scramble(Net()), torch.randn(1, 3, 6, 6))
    export_baseline(program, folder / "baseline.onnx")
    export(optimized(program, "all"), folder / "model.onnx")
    return folder / "baseline.onnx", folder / "model.onnx"


@pytest.mark.parametrize("which", [0, 1])
def test_the_modules_of_nodes_that_torch_exported(files: tuple[Path, Path], which: int) -> None:
    nodes = {node.op_type: node.name for node in onnx.load(files[which]).graph.node}
    # A folded convolution carries the note of the batch norm, or of the activation in it.
    modules = {
        op: getattr(place_of(files[which], name), "module", "") for op, name in nodes.items()
    }
    assert modules["Conv"] in ("stem.1", "stem.2")
    assert modules["Relu"] == "stem.2"
    assert modules["Gemm"] == "head"
    place = place_of(files[which], nodes["Relu"])
    assert str(place) == f"the node '{nodes['Relu']}' (Relu) of the module 'stem.2'"
    assert place_of(files[which], "no such node") is None


@pytest.mark.parametrize(
    "text",
    [
        "ITopKLayer {}: {}: K exceeds the maximum value allowed (3840).",
        "Could not find any implementation for node {ForeignNode[{}...node_of_another]}.",
        "Could not find any implementation for node {}_myl0_12.",
        "node '{}' failed",
        "[{}]",
    ],
)
def test_the_node_that_a_message_names(files: tuple[Path, Path], text: str) -> None:
    name = next(node.name for node in onnx.load(files[0]).graph.node if node.op_type == "Relu")
    place = place_in(files[0], text.replace("{}", name))
    assert place is not None
    assert (place.node, place.operator) == (name, "Relu")


def test_a_message_that_names_none(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert place_in(files[0], "Out of memory: relu, node_reluctant") is None
    (tmp_path / "noise.onnx").write_bytes(b"\xff" * 99)
    assert place_in(tmp_path / "noise.onnx", "node_relu") is None
    assert place_in(tmp_path / "absent.onnx", "node_relu") is None


def test_the_sha256_takes_in_weights_in_other_files(tmp_path: Path) -> None:
    weight = np.full((3,), 0.5, np.float32)

    def saved(name: str, value: np.ndarray, **how: object) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"], name="add")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, (3,))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (3,))],
            [numpy_helper.from_array(value, "w")],
        )
        onnx.save(helper.make_model(graph), tmp_path / name, **how)
        return tmp_path / name

    inside = saved("inside.onnx", weight)
    assert external_data(inside) == []
    assert file_sha256(inside) == sha256(inside)
    apart = saved(
        "apart.onnx",
        weight,
        save_as_external_data=True,
        location="apart.data",
        size_threshold=0,
    )
    assert external_data(apart) == [tmp_path / "apart.data"]
    before, main = file_sha256(apart), sha256(apart)
    (tmp_path / "apart.data").write_bytes((weight + 1).tobytes())
    assert sha256(apart) == main
    assert file_sha256(apart) != before
