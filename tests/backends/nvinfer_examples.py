"""Small ONNX files that engines of the TensorRT family are built from."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optfuse.backends.tensorrt_rtx import BACKEND as RTX
from optfuse.stages import Artifact, BuildOptions, InputShapes

builds_ahead = pytest.mark.skipif(RTX.unavailable() is not None, reason=str(RTX.unavailable()))
SM_89 = BuildOptions(targets=("sm_89",))


def onnx_artifact(
    path: Path,
    nodes: list[onnx.NodeProto],
    shape: tuple[int | str, ...] = (1, 3, 8, 8),
    weights: dict[str, np.ndarray] | None = None,
    **save: Any,
) -> Artifact:
    """A file with these nodes between the input `image` and the output `score`."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path, **save)
    return Artifact(path, "onnx", "a" * 64, 1, "baseline", ("image",), ("score",))


def residual_block(path: Path, **save: Any) -> Artifact:
    """Two convolutions, each followed by a ReLU, the second with a residual in between."""
    random = np.random.default_rng(3)
    weights = {
        "w1": random.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "w2": random.normal(size=(4, 4, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="first_relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["sum"], name="residual"),
        helper.make_node("Relu", ["sum"], ["score"], name="second_relu"),
    ]
    return onnx_artifact(path, nodes, weights=weights, **save)


def open_batch(path: Path, shape: tuple[int | str, ...] = ("N", 3, 8, 8)) -> Artifact:
    weights = {"w": np.random.default_rng(3).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    node = helper.make_node("Conv", ["image", "w"], ["score"], name="wide")
    return onnx_artifact(path, [node], shape, weights)


def shapes(*three: tuple[int, ...], name: str = "image") -> tuple[InputShapes, ...]:
    return (InputShapes(name, *three),)


def batches(*sizes: int) -> tuple[InputShapes, ...]:
    return shapes(*((size, 3, 8, 8) for size in sizes))
