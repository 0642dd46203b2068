"""FLOPs and bytes of ONNX files: by hand, and against the programs they were exported from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optfuse import cost
from optfuse.capture import capture
from optfuse.export import export, export_baseline
from optfuse.onnx_cost import compulsory_bytes_of, flops_of
from optfuse.stages import LoadedModel
from tests.harness import optimized

Shape = tuple[int | str | None, ...]


def file_of(
    folder: Path,
    nodes: list[Any],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    dtype: int = TensorProto.FLOAT,
    **options: Any,
) -> Path:
    """An ONNX file of these operators; weights never hold zeros."""

    def described(values: Mapping[str, Shape]) -> list[Any]:
        return [helper.make_tensor_value_info(name, dtype, list(s)) for name, s in values.items()]

    initializers = [numpy_helper.from_array(each, name) for name, each in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", described(inputs), described(outputs), initializers)
    path = folder / "test.onnx"
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, **options), path)
    return path


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


NETWORKS = ("squeezenet", "unet", "vit_tiny")
"""With transposed convolutions, matrix products, and attention."""


@pytest.mark.parametrize("network", NETWORKS)
def test_a_program_and_its_export_cost_the_same(network: str, tmp_path: Path) -> None:
    module = import_module(f"models.{network}")
    program = capture(LoadedModel(network, module.build().eval(), module.example_inputs()))
    baseline = export_baseline(program, tmp_path / "baseline.onnx")
    assert flops_of(baseline.path) == cost.flops(program) > 1e8
    faster = optimized(program, "all")
    ours = export(faster, tmp_path / "model.onnx")
    assert flops_of(ours.path) == cost.flops(faster)
    # The file also holds the shapes of its Reshapes, the lengths of its Splits and biases of
    # zeros, 300 bytes beside megabytes; and the 192 ones that ONNX's LayerNormalization must be
    # given as a scale where the linear layers behind it took in its own.
    more = 300 + (192 * 4 if network == "vit_tiny" else 0)
    found = compulsory_bytes_of(ours.path)
    assert found == pytest.approx(cost.compulsory_bytes(faster), abs=more)


LAYERS: list[tuple[Any, tuple[int, ...], dict[str, np.ndarray[Any, Any]], tuple[int, ...], int]] = [
    (
        helper.make_node("Conv", ["x", "w"], ["y"], group=2, kernel_shape=[3, 3]),
        (2, 4, 8, 9),
        {"w": ones(6, 2, 3, 3)},
        (2, 6, 6, 7),
        2 * (2 * 6 * 6 * 7) * (2 * 3 * 3),
    ),
    (
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
        (1, 4, 3, 5),
        {"w": ones(4, 6, 2, 2)},
        (1, 6, 6, 10),
        2 * (4 * 3 * 5) * (6 * 2 * 2),
    ),
    (
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
        (3, 5),
        {"w": ones(7, 5)},
        (3, 7),
        2 * 3 * 7 * 5,
    ),
    (
        helper.make_node("Gemm", ["x", "w"], ["y"], transA=1),
        (5, 3),
        {"w": ones(5, 7)},
        (3, 7),
        2 * 3 * 7 * 5,
    ),
    (
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        (4, 1, 3, 5),
        {"w": ones(2, 5, 7)},
        (4, 2, 3, 7),
        2 * (4 * 2) * 3 * 7 * 5,
    ),
    (helper.make_node("MatMul", ["x", "w"], ["y"]), (5,), {"w": ones(5, 7)}, (7,), 2 * 7 * 5),
    (
        helper.make_node("Einsum", ["x", "w"], ["y"], equation="bij, bjk -> bik"),
        (2, 3, 5),
        {"w": ones(2, 5, 7)},
        (2, 3, 7),
        2 * 2 * 3 * 5 * 7,
    ),
    (helper.make_node("Mul", ["x", "w"], ["y"]), (3, 5), {"w": ones(5)}, (3, 5), 0),
]


@pytest.mark.parametrize(("node", "given", "weights", "result", "flops"), LAYERS)
def test_cost_of_an_operator(
    node: Any,
    given: tuple[int, ...],
    weights: dict[str, np.ndarray[Any, Any]],
    result: tuple[int, ...],
    flops: int,
    tmp_path: Path,
) -> None:
    path = file_of(tmp_path, [node], {"x": given}, {"y": result}, weights)
    assert flops_of(path) == flops
    elements = np.prod(given) + weights["w"].size + np.prod(result)
    assert compulsory_bytes_of(path) == 4 * elements


UNCOUNTED = [
    helper.make_node("Einsum", ["x", "x"], ["y"], equation="...ij,...jk->...ik"),
    helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,jk"),
    # The sum over k alone can be taken before the product, so the count would be too high.
    helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,kj->ij"),
    helper.make_node("Einsum", ["x", "x", "x"], ["y"], equation="ij,ij,ij->ij"),
    helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft"),
    helper.make_node("DeformConv", ["x", "x", "x"], ["y"]),
    helper.make_node("MatMulInteger", ["x", "x"], ["y"]),
]


@pytest.mark.parametrize("node", UNCOUNTED, ids=lambda node: node.op_type)
def test_what_cannot_be_counted_is_not_guessed(node: Any, tmp_path: Path) -> None:
    product = helper.make_node("MatMul", ["x", "x"], ["z"])
    path = file_of(tmp_path, [product, node], {"x": (5, 5)}, {"y": (5, 5)})
    assert flops_of(path) is None
    assert compulsory_bytes_of(path) == 4 * (25 + 25)


def test_arithmetic_in_a_branch_is_not_counted(tmp_path: Path) -> None:
    def branch(name: str) -> Any:
        node = helper.make_node("MatMul", ["x", "x"], [name])
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [5, 5])
        return helper.make_graph([node], name, [], [value])

    less = helper.make_node("IsInf", ["x"], ["flags"])
    choose = helper.make_node(
        "If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b")
    )
    cast = helper.make_node("ReduceMax", ["flags"], ["flag"], keepdims=0)
    path = file_of(tmp_path, [less, cast, choose], {"x": (5, 5)}, {"y": (5, 5)})
    assert flops_of(path) is None


OPEN = [
    helper.make_node("MatMul", ["x", "w"], ["h"]),
    helper.make_node("MatMul", ["h", "v"], ["y"]),
]
WEIGHTS = {"w": ones(5, 7), "v": ones(7, 2)}


def test_sizes_that_the_file_leaves_open_are_given(tmp_path: Path) -> None:
    path = file_of(tmp_path, OPEN, {"x": ("batch", 5)}, {"y": ("batch", 2)}, WEIGHTS)
    assert flops_of(path) is None
    assert compulsory_bytes_of(path) is None
    for batch in (1, 3):
        assert flops_of(path, {"x": (batch, 5)}) == 2 * batch * (5 * 7 + 7 * 2)
        moved = batch * 5 + 5 * 7 + 7 * 2 + batch * 2
        assert compulsory_bytes_of(path, {"x": (batch, 5)}) == 4 * moved


def test_an_open_size_without_a_name_and_an_output_of_unknown_shape(tmp_path: Path) -> None:
    path = file_of(tmp_path, OPEN, {"x": (None, 5)}, {"y": (None, None)}, WEIGHTS)
    assert flops_of(path, {"x": (3, 5)}) == 2 * 3 * (5 * 7 + 7 * 2)
    assert compulsory_bytes_of(path, {"x": (3, 5)}) == 4 * (15 + 35 + 14 + 6)


@pytest.mark.parametrize("given", [(3, 6), (3,), (3, 5, 1)])
def test_a_shape_that_the_file_does_not_take(given: tuple[int, ...], tmp_path: Path) -> None:
    path = file_of(tmp_path, OPEN, {"x": ("batch", 5)}, {"y": ("batch", 2)}, WEIGHTS)
    assert flops_of(path, {"x": given}) is None


def test_one_symbol_is_one_size(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "z"], ["y"])
    inputs: dict[str, Shape] = {"x": ("n", 5), "z": (5, "n")}
    path = file_of(tmp_path, [node], inputs, {"y": ("n", "n")})
    assert flops_of(path, {"x": (3, 5)}) == 2 * 3 * 3 * 5
    assert flops_of(path, {"x": (3, 5), "z": (5, 3)}) == 2 * 3 * 3 * 5
    assert flops_of(path, {"x": (3, 5), "z": (5, 4)}) is None


def test_shapes_are_worked_out_through_shape_arithmetic(tmp_path: Path) -> None:
    """A flattening that computes its own shape, as exporters write it for an open batch."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], end=1),
        helper.make_node("Concat", ["shape", "rest"], ["flat"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    weights = {"w": ones(20, 7), "rest": np.array([20], np.int64)}
    path = file_of(tmp_path, nodes, {"x": ("batch", 4, 5)}, {"y": ("batch", 7)}, weights)
    assert flops_of(path, {"x": (3, 4, 5)}) == 2 * 3 * 7 * 20


def test_weights_in_another_file_are_not_needed(tmp_path: Path) -> None:
    path = file_of(tmp_path, OPEN, {"x": (3, 5)}, {"y": (3, 2)}, WEIGHTS)
    expected = flops_of(path), compulsory_bytes_of(path)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert (flops_of(path), compulsory_bytes_of(path)) == expected


def test_constants_that_are_operators_are_weights_too(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(ones(5, 7)))
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = file_of(tmp_path, [constant, product], {"x": (3, 5)}, {"y": (3, 7)})
    assert flops_of(path) == 2 * 3 * 5 * 7
    assert compulsory_bytes_of(path) == 4 * (15 + 35 + 21)


def test_functions_of_the_file_are_counted_where_they_are_called(tmp_path: Path) -> None:
    opset = helper.make_opsetid("", 20)
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    function = helper.make_function("own", "Product", ["a", "b"], ["c"], body, [opset])
    nodes = [
        helper.make_node("Product", ["x", "w"], ["h"], domain="own"),
        helper.make_node("Product", ["h", "v"], ["y"], domain="own"),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 2])],
        [numpy_helper.from_array(each, name) for name, each in WEIGHTS.items()],
    )
    opsets = [opset, helper.make_opsetid("own", 1)]
    path = tmp_path / "test.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function]), path)
    assert flops_of(path) == 2 * 3 * (5 * 7 + 7 * 2)


def test_of_a_table_what_is_looked_up_is_moved(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "indices"], ["y"])
    weights = {"table": ones(100, 4), "indices": np.array([3, 7, 9], np.int64)}
    path = file_of(tmp_path, [node], {}, {"y": (3, 4)}, weights)
    assert compulsory_bytes_of(path) == 3 * 4 * 4 + 3 * 8 + 3 * 4 * 4


def test_what_is_not_used_is_not_moved(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    inputs: dict[str, Shape] = {"x": (3, 5), "ignored": (100,)}
    path = file_of(tmp_path, [node], inputs, {"y": (3, 5)}, {"unused": ones(50)})
    assert compulsory_bytes_of(path) == 4 * (15 + 15)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (TensorProto.FLOAT16, 2 * (15 + 15)),
        (TensorProto.DOUBLE, 8 * (15 + 15)),
        (TensorProto.INT4, 8 + 8),  # two to a byte, 15 of them
        (TensorProto.STRING, None),
    ],
)
def test_bytes_are_those_of_each_dtype(dtype: int, expected: int | None, tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    path = file_of(tmp_path, [node], {"x": (3, 5)}, {"y": (3, 5)}, dtype=dtype)
    assert compulsory_bytes_of(path) == expected
