"""What an ONNX file costs, by counting: floating-point operations and bytes moved.

Counted as `optfuse.cost` counts a program, so that a program and its export cost the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference

Shape = tuple[int, ...]

LOOK_UPS = {"Gather", "GatherElements", "GatherND", "Slice"}
"""Operators that read no more of their first input than they give back."""

UNCOUNTED = {
    *("Attention", "DFT", "DeformConv", "GRU", "LSTM", "RNN", "STFT"),
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("If", "Loop", "Scan"),
}
"""Operators that may do a large part of a file's arithmetic and are not counted here."""

PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
"""Types of which several elements lie in a byte."""

MOST_OF_A_SHAPE = 64
"""Constants with more elements are weights, from which no shape is worked out."""


def flops_of(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> int | None:
    """Floating-point operations of one run of an ONNX file, a multiply-add counted as two.

    Convolutions and matrix products are counted, elementwise operators left out.

    Args:
        path: of the file; weights that lie in other files are not read.
        shapes: of inputs whose sizes the file leaves open, by name.

    Returns:
        None where a shape stays unknown or does not fit the file, or where operators do the work
        that are not counted here: those of `UNCOUNTED`, and all that are not ONNX's own.
    """
    costs = _costs(path, shapes or {})
    return None if costs is None else costs.flops()


def compulsory_bytes_of(
    path: Path, shapes: Mapping[str, Sequence[int]] | None = None
) -> int | None:
    """Bytes that one run of an ONNX file moves at least, as `cost.compulsory_bytes` has it.

    Args:
        path: of the file; weights that lie in other files are not read.
        shapes: of inputs whose sizes the file leaves open, by name.

    Returns:
        None where a shape stays unknown or does not fit the file.
    """
    costs = _costs(path, shapes or {})
    return None if costs is None else costs.compulsory_bytes()


class _UnknownError(Exception):
    """Something that has to be known for counting is not."""


@dataclass(frozen=True)
class _Costs:
    """A graph whose shapes are known as far as they can be.

    Attributes:
        graph: ONNX's own.
        constants: names of the weights.
        shapes: of every value where it is known.
        bits: of one element of every value where its type is known.
    """

    graph: Any
    constants: frozenset[str]
    shapes: Mapping[str, Shape]
    bits: Mapping[str, int]

    def flops(self) -> int | None:
        """The sum over all operators, or None."""
        try:
            return sum(self._flops_of(node) for node in self.graph.node)
        except _UnknownError:
            return None

    def compulsory_bytes(self) -> int | None:
        """Weights and inputs that are used, and outputs, once each; or None."""
        read = self.constants | {value.name for value in self.graph.input}
        try:
            return sum(self._bytes_read(name) for name in read) + sum(
                self._nbytes(value.name) for value in self.graph.output
            )
        except _UnknownError:
            return None

    @cached_property
    def _users(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    def _shape(self, name: str) -> Shape:
        if name not in self.shapes:
            raise _UnknownError
        return self.shapes[name]

    def _nbytes(self, name: str) -> int:
        if name not in self.bits:
            raise _UnknownError
        return math.ceil(math.prod(self._shape(name)) * self.bits[name] / 8)

    def _bytes_read(self, name: str) -> int:
        """What the operators that take a value read of it at least."""
        users = self._users.get(name, [])
        if not users:
            return 0
        if any(node.op_type not in LOOK_UPS or name in node.input[1:] for node in users):
            return self._nbytes(name)
        return min(sum(self._nbytes(node.output[0]) for node in users), self._nbytes(name))

    def _flops_of(self, node: Any) -> int:
        if node.domain not in ("", "ai.onnx") or node.op_type in UNCOUNTED:
            raise _UnknownError
        return _FLOPS[node.op_type](self, node) if node.op_type in _FLOPS else 0

    def _convolution(self, node: Any) -> int:
        """Every output element is a sum over the weight without its first dimension: the channels
        of a group, and the kernel."""
        weight = self._shape(node.input[1])
        return 2 * math.prod(self._shape(node.output[0])) * math.prod(weight[1:])

    def _transposed_convolution(self, node: Any) -> int:
        """Every input element is multiplied with the weight without its first dimension."""
        weight = self._shape(node.input[1])
        return 2 * math.prod(self._shape(node.input[0])) * math.prod(weight[1:])

    def _matrix_product(self, node: Any) -> int:
        """Every output element is a sum over the last dimension of the first factor."""
        return 2 * math.prod(self._shape(node.output[0])) * self._shape(node.input[0])[-1]

    def _general_matrix_product(self, node: Any) -> int:
        """The same, with a first factor that may be transposed."""
        transposed = any(each.name == "transA" and each.i for each in node.attribute)
        summed = self._shape(node.input[0])[0 if transposed else 1]
        return 2 * math.prod(self._shape(node.output[0])) * summed

    def _einsum(self, node: Any) -> int:
        """A multiply-add for every combination of the indices of two factors.

        Unknown where an index stands in one factor alone and is summed over, since that sum can be
        taken before the product.
        """
        equation = next(each.s.decode() for each in node.attribute if each.name == "equation")
        left, arrow, result = equation.replace(" ", "").partition("->")
        factors = left.split(",")
        if len(factors) != 2 or not arrow or "." in equation:
            raise _UnknownError
        if not set(factors[0]) ^ set(factors[1]) <= set(result):
            raise _UnknownError
        sizes: dict[str, int] = {}
        for indices, name in zip(factors, node.input, strict=True):
            sizes.update(zip(indices, self._shape(name), strict=True))
        return 2 * math.prod(sizes.values())


_FLOPS: dict[str, Callable[[_Costs, Any], int]] = {
    "Conv": _Costs._convolution,
    "ConvTranspose": _Costs._transposed_convolution,
    "Einsum": _Costs._einsum,
    "Gemm": _Costs._general_matrix_product,
    "MatMul": _Costs._matrix_product,
}


def _costs(path: Path, given: Mapping[str, Sequence[int]]) -> _Costs | None:
    """The file with every shape worked out that can be; None where `given` does not fit it."""
    model = onnx.load(path, load_external_data=False)
    constants = _constants(model.graph)
    if not _fill_in(model.graph, given):
        return None
    for tensor in model.graph.initializer:
        _drop_weights(tensor)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes, bits = {}, {}
    for value in _values(model.graph):
        kind = value.type.tensor_type
        bits[value.name] = _bits(kind.elem_type)
        if kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim):
            shapes[value.name] = tuple(size.dim_value for size in kind.shape.dim)
    shapes.update({name: tuple(tensor.dims) for name, tensor in constants.items()})
    bits.update({name: _bits(tensor.data_type) for name, tensor in constants.items()})
    known = {name: each for name, each in bits.items() if each is not None}
    return _Costs(model.graph, frozenset(constants), shapes, known)


def _constants(graph: Any) -> dict[str, Any]:
    """Every tensor that stands in the file: initializers, and constants as an operator each."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                found[node.output[0]] = attribute.t
    return found


def _fill_in(graph: Any, given: Mapping[str, Sequence[int]]) -> bool:
    """Write the given sizes into the graph wherever the same symbol stands; whether they fit."""
    symbols: dict[str, int] = {}
    for value in graph.input:
        kind = value.type.tensor_type
        sizes = given.get(value.name)
        if sizes is None or not kind.HasField("shape"):
            continue
        if len(sizes) != len(kind.shape.dim):
            return False
        for dimension, size in zip(kind.shape.dim, sizes, strict=True):
            if symbols.setdefault(dimension.dim_param, size) != size and dimension.dim_param:
                return False
            if dimension.HasField("dim_value") and dimension.dim_value != size:
                return False
            dimension.dim_value = size
    for value in _values(graph):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param and dimension.dim_param in symbols:
                dimension.dim_value = symbols[dimension.dim_param]
    return True


def _drop_weights(tensor: Any) -> None:
    """Leave a weight's shape and type: shape inference would copy its data to and fro."""
    if math.prod(tensor.dims) > MOST_OF_A_SHAPE:
        for name in ("raw_data", "float_data", "double_data", "int32_data", "int64_data"):
            tensor.ClearField(name)


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.input
    yield from graph.value_info
    yield from graph.output


def _bits(number: int) -> int | None:
    """Bits of one element of a type, by its number in onnx.TensorProto.DataType."""
    name = onnx.TensorProto.DataType.Name(number)
    if name in ("UNDEFINED", "STRING"):
        return None
    return PACKED_BITS.get(name) or 8 * onnx.helper.tensor_dtype_to_np_dtype(number).itemsize
