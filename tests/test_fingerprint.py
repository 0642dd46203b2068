"""What two programs or files may differ in and still count as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from optfuse import fingerprint
from optfuse.export import export, export_baseline
from optfuse.stages import Program
from tests.harness import captured, optimized, scramble


def numbers(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> Program:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    return captured(scramble(layers, seed).to(dtype), numbers(2, 3, 8, 8).to(dtype))


def test_a_tensor_is_its_type_shape_layout_and_bits() -> None:
    tensor = numbers(2, 3, 4, 4)
    same = fingerprint.of_tensor(tensor)
    assert same == fingerprint.of_tensor(tensor.clone())
    others = [
        tensor.double(),
        tensor.view(2, 3, 16),
        tensor.clone(memory_format=torch.channels_last),
        tensor.nextafter(torch.tensor(9.0)),
        -tensor,
    ]
    assert len({same, *map(fingerprint.of_tensor, others)}) == 6


def test_every_dtype_has_a_fingerprint_and_so_has_a_scalar() -> None:
    dtypes = (torch.bool, torch.int8, torch.bfloat16, torch.complex64)
    found = {fingerprint.of_tensor(torch.ones((), dtype=dtype)) for dtype in dtypes}
    assert len(found) == 4
    assert fingerprint.of_tensor(torch.ones(0)) != fingerprint.of_tensor(torch.ones(1))


def test_a_program_is_its_graph_and_its_constants() -> None:
    program = network()
    same = fingerprint.of_program(program)
    assert same == fingerprint.of_program(network())
    assert same == fingerprint.of_program(optimized(program, "none"))
    assert same == fingerprint.of_program(optimized(program, "elide_concat"))
    others = [
        network(seed=1),
        network(dtype=torch.float64),
        optimized(program, "eliminate_identity"),
        optimized(program, "fold_conv_bn"),
    ]
    assert len({same, *map(fingerprint.of_program, others)}) == 5


def test_the_same_passes_give_the_same_program_again() -> None:
    program = network()
    one, other = optimized(program, "all"), optimized(program, "all", seed=7)
    assert fingerprint.of_program(one) == fingerprint.of_program(other)


def test_files_are_the_same_where_only_names_and_annotations_differ(tmp_path: Path) -> None:
    """torch.onnx drops the dropout itself; our file has our output's name and other remarks."""
    program = network()
    baseline = export_baseline(program, tmp_path / "baseline.onnx")
    after = optimized(program, "eliminate_identity")
    ours = export(after, tmp_path / "ours.onnx", output_names=["other"])
    assert ours.sha256 != baseline.sha256
    assert fingerprint.of_onnx(ours.path) == fingerprint.of_onnx(baseline.path)


def test_a_fused_activation_is_exported_as_it_was(tmp_path: Path) -> None:
    layers = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    program = captured(layers, numbers(2, 3, 8, 8))
    baseline = export_baseline(program, tmp_path / "baseline.onnx")
    ours = export(optimized(program, "fuse_conv_activation"), tmp_path / "ours.onnx")
    assert fingerprint.of_onnx(ours.path) == fingerprint.of_onnx(baseline.path)


def convolution(path: Path, change: Callable[[Any], None] = lambda model: None) -> str:
    """The fingerprint of a small file, changed before it was written."""
    weight = numpy_helper.from_array(np.arange(1, 55, dtype=np.float32).reshape(2, 3, 3, 3), "w")
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="first"),
        helper.make_node("Conv", ["h", "w"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    change(model)
    onnx.save(model, path)
    return fingerprint.of_onnx(path)


def rename(model: Any) -> None:
    graph = model.graph
    graph.name, graph.node[0].name, graph.doc_string = "other", "renamed", "a remark"
    graph.input[0].name = graph.node[0].input[0] = "image"
    graph.node[0].output[0] = graph.node[1].input[0] = "inside"
    graph.initializer[0].name = graph.node[1].input[1] = "weight"
    graph.output[0].name = graph.node[1].output[0] = "result"
    graph.node[1].attribute[0].doc_string = "a remark"
    model.producer_name = "somebody"
    entry = graph.node[0].metadata_props.add()
    entry.key, entry.value = "stack_trace", "a line"


def drop_kernel_shape(model: Any) -> None:
    (position,) = (
        at for at, each in enumerate(model.graph.node[1].attribute) if each.name == "kernel_shape"
    )
    del model.graph.node[1].attribute[position]


def reorder_attributes(model: Any) -> None:
    attributes = list(model.graph.node[1].attribute)
    del model.graph.node[1].attribute[:]
    model.graph.node[1].attribute.extend(reversed(attributes))


@pytest.mark.parametrize("change", [rename, drop_kernel_shape, reorder_attributes])
def test_what_does_not_count(change: Callable[[Any], None], tmp_path: Path) -> None:
    assert convolution(tmp_path / "a.onnx") == convolution(tmp_path / "b.onnx", change)


def change_weight(model: Any) -> None:
    raw = bytearray(model.graph.initializer[0].raw_data)
    raw[0] ^= 1
    model.graph.initializer[0].raw_data = bytes(raw)


def change_operator(model: Any) -> None:
    model.graph.node[0].op_type = "Tanh"


def change_attribute(model: Any) -> None:
    model.graph.node[1].attribute[-1].ints[0] += 1


def change_opset(model: Any) -> None:
    model.opset_import[0].version = 21


def change_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def skip_an_operator(model: Any) -> None:
    model.graph.node[1].input[0] = "x"


def return_something_else(model: Any) -> None:
    model.graph.output[0].name = "h"


CHANGES = [
    change_weight,
    change_operator,
    change_attribute,
    change_opset,
    change_input,
    skip_an_operator,
    return_something_else,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_counts(change: Callable[[Any], None], tmp_path: Path) -> None:
    assert convolution(tmp_path / "a.onnx") != convolution(tmp_path / "b.onnx", change)


def test_a_kernel_shape_counts_where_the_weight_is_no_constant(tmp_path: Path) -> None:
    def open_weight(model: Any) -> None:
        del model.graph.initializer[:]
        given = helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3, 3, 3])
        model.graph.input.append(given)

    def both(model: Any) -> None:
        open_weight(model)
        drop_kernel_shape(model)

    one, other = (convolution(tmp_path / "a.onnx", each) for each in (open_weight, both))
    assert one != other


def test_weights_in_another_file_count_as_well(tmp_path: Path) -> None:
    same = convolution(tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, size_threshold=0)
    assert fingerprint.of_onnx(tmp_path / "b.onnx") == same


def test_a_file_with_graphs_inside_is_compared_byte_for_byte(tmp_path: Path) -> None:
    """Names inside such a graph reach out of it, so that no name may change."""

    def branches(model: Any) -> None:
        def branch(name: str) -> Any:
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            return helper.make_graph([helper.make_node("Relu", ["h"], [name])], name, [], [value])

        flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
        model.graph.initializer.append(flag)
        choose = helper.make_node("If", ["flag"], ["z"])
        choose.attribute.append(helper.make_attribute("then_branch", branch("a")))
        choose.attribute.append(helper.make_attribute("else_branch", branch("b")))
        model.graph.node.append(choose)

    def renamed(model: Any) -> None:
        branches(model)
        rename(model)

    one, same, other = (
        convolution(tmp_path / "a.onnx", each) for each in (branches, branches, renamed)
    )
    assert one == same != other
