"""An ONNX file in float64: every float type in it read as float64, run by ONNX's own reference
implementation.

Its constants were rounded when the file was written, and stay so: this is the function of the file,
not of the model it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, TypeProto
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from optfuse.errors import LoadError, ModelError

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}

_TYPE_ATTRIBUTES = {"to", "dtype", "output_datatype"}
"""Integer attributes that are a type. `stash_type` is none of them: what it asks for in between is
at least float32, and the reference implementation keeps its inputs' own type."""

_IN_FLOAT32 = {
    *("AffineGrid", "CausalConvWithState", "DynamicQuantizeLinear", "LinearAttention"),
    *("MelWeightMatrix", "TfIdfVectorizer"),
}
"""Operators that the reference implementation computes in float32 whatever it is given."""


def run_file_float64(path: Path, feeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of an ONNX file in float64.

    Args:
        path: of the file.
        feeds: in the order of its inputs, of any float type.

    Raises:
        LoadError: it, or its weights, cannot be read.
        ModelError: an operator has no reference implementation in float64.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's and the file system's own
        raise LoadError(
            f"'{path}' cannot be read",
            f"It is no ONNX file: {type(error).__name__}",
            "Export the model again",
        ) from error
    constants = {each.name for each in model.graph.initializer}
    names = [each.name for each in model.graph.input if each.name not in constants]
    return run_model_float64(model, path, dict(zip(names, feeds, strict=True)))


def run_model_float64(
    model: ModelProto, path: Path, feeds: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The outputs of an ONNX model in float64; the model is widened in place.

    Args:
        model: may have its weights in other files.
        path: of the file that it is, or is a part of.
        feeds: at least its inputs.

    Raises:
        LoadError: its weights cannot be read.
        ModelError: an operator has no reference implementation in float64.
    """
    _load_weights(model, path)
    _require_float64(model, path)
    widen(model)
    given = {
        each.name: _as_numpy(feeds[each.name]) for each in model.graph.input if each.name in feeds
    }
    try:
        # Its warnings (overflow, division by zero) are about values that we look at ourselves.
        with np.errstate(all="ignore"):
            found: Any = ReferenceEvaluator(model, new_ops=[Erf, Gelu]).run(None, given)
    except Exception as error:  # numpy's, and those of an operator that it does not know
        raise _cannot_run(path, f"{type(error).__name__}: {_first_line(error)}") from error
    return [torch.from_numpy(np.array(each)) for each in found]


def widen(model: ModelProto) -> None:
    """Read every float type of a model as float64, in place: constants, types, casts."""
    graphs = [model.graph]
    for function in model.functions:
        graphs += _widen_nodes(function.node)
    while graphs:
        graph = graphs.pop()
        for value in (*graph.input, *graph.output, *graph.value_info):
            _widen_type(value.type)
        for tensor in (*graph.initializer, *(each.values for each in graph.sparse_initializer)):
            _widen_tensor(tensor)
        graphs += _widen_nodes(graph.node)


class Erf(OpRun):
    """The error function in the precision of its input; ONNX's own rounds to float32."""

    def _run(self, x: Any) -> tuple[Any]:
        return (torch.special.erf(torch.from_numpy(np.array(x))).numpy(),)


class Gelu(OpRun):
    """Whose body in ONNX has constants that are rounded to float32."""

    def _run(self, x: Any, approximate: str = "none") -> tuple[Any]:
        given = torch.from_numpy(np.array(x))
        return (torch.nn.functional.gelu(given, approximate=approximate or "none").numpy(),)


def _widen_nodes(nodes: Iterable[NodeProto]) -> list[onnx.GraphProto]:
    """Widen what nodes hold themselves; their branches, which are still to be widened."""
    branches: list[onnx.GraphProto] = []
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.INT and attribute.name in _TYPE_ATTRIBUTES:
                attribute.i = TensorProto.DOUBLE if attribute.i in _FLOATS else attribute.i
            for tensor in (attribute.t, *attribute.tensors):
                _widen_tensor(tensor)
            for type_of in (attribute.tp, *attribute.type_protos):
                _widen_type(type_of)
            branches += [attribute.g] if attribute.HasField("g") else []
            branches += attribute.graphs
        if node.op_type in ("Constant", "ConstantOfShape"):
            _widen_constant(node)
    return branches


def _widen_constant(node: NodeProto) -> None:
    """A constant that is no tensor is a float32: make it a tensor of float64."""
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = onnx.numpy_helper.from_array(np.zeros(1))
        node.attribute.append(onnx.helper.make_attribute("value", zero))
    for attribute in node.attribute:
        if attribute.name in ("value_float", "value_floats"):
            single = attribute.name == "value_float"
            value = np.array(attribute.f if single else list(attribute.floats), dtype=np.float64)
            attribute.CopyFrom(
                onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(value))
            )


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))


def _widen_type(type_of: TypeProto) -> None:
    while (kind := type_of.WhichOneof("value")) in ("sequence_type", "optional_type"):
        type_of = getattr(type_of, kind).elem_type
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(type_of, kind)
        tensor.elem_type = TensorProto.DOUBLE if tensor.elem_type in _FLOATS else tensor.elem_type


def _require_float64(model: ModelProto, path: Path) -> None:
    nodes = [*model.graph.node, *(node for each in model.functions for node in each.node)]
    rounded = {node.op_type for node in nodes} & _IN_FLOAT32
    if rounded:
        names = ", ".join(sorted(rounded))
        raise _cannot_run(path, f"ONNX's reference implementation computes {names} in float32")


def _load_weights(model: ModelProto, path: Path) -> None:
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # the file system's, and ONNX's own checks
        raise LoadError(
            f"The weights of '{path}' cannot be read",
            f"{type(error).__name__}: {_first_line(error)}",
            "Export the model again, or put its second file beside it",
        ) from error


def _cannot_run(path: Path, cause: str) -> ModelError:
    return ModelError(
        f"'{path}' cannot be run in float64",
        cause,
        "Compare it with its model's source, or with another file: optfuse diff ONE OTHER",
    )


def _as_numpy(tensor: torch.Tensor) -> Any:
    return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
