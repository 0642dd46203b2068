"""Which nodes of an ONNX file can compute in int8, and which hand int8 on between them.

A layer is a node with weights. What normalises, takes a softmax or reduces (a mean, an average
pooling, a sum) is neither a layer nor anything between them: it stays float32 by rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from optfuse.graph import ONNX_LAYERS
from optfuse.stages import Involved

LAYER_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")

ACTIVATIONS = ("Relu", "Clip")
"""A range that begins or ends where they cut off does their work."""

MOVES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice")
"""They pick or move numbers, and so hand on the scale of what they read."""

COMBINES = ("Add", "Concat", "Mul", "Sigmoid")
"""ONNX Runtime has int8 kernels for them on a CPU, with a scale of their own for the result.

EfficientNet-B0, which has a sigmoid and a product behind nearly every convolution, ran 1.17 times
as fast with the last two as without them (ONNX Runtime 1.31, one thread of a CPU with VNNI).
"""


@dataclass(frozen=True)
class Layer:
    """A node that multiplies by weights, or by something else.

    Attributes:
        node: itself, which is never written to.
        reason: why it cannot compute in int8, as a user understands it; None where it can.
    """

    node: onnx.NodeProto
    reason: str | None

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name

    @property
    def values(self) -> tuple[str, str]:
        """What it multiplies its weights by, and what it gives."""
        return self.node.input[0], self.node.output[0]


class Nodes:
    """The nodes of an ONNX file, and who reads what.

    Args:
        model: never written to.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {each.name: each for each in model.graph.initializer}
        self.returned = {each.name for each in model.graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._model = model
        self._stated = _stated(model)

    def layers(self) -> list[Layer]:
        """Every layer in the file's order, and then those inside of branches and loops."""
        inside = "it is inside of a branch or a loop, all of which stays float32"
        found = [Layer(node, self._reason(node)) for node in _layers_of(self._model.graph.node)]
        return found + [Layer(node, inside) for node in _layers_of(_within(self._model.graph))]

    def between(self, low: Collection[str]) -> list[str]:
        """The nodes that read nothing but results of the layers `low`, directly or through others
        like them, and can hand them on in int8."""
        held: set[str] = set()
        found = []
        for node in self._model.graph.node:
            if node.name in low:
                held.update(node.output)
            elif self._hands_on(node, held):
                found.append(node.name)
                held.update(node.output)
        return found

    def cut_off_by(self, value: str) -> onnx.NodeProto | None:
        """The activation that cuts a value off, where nothing else reads the value."""
        readers = self.readers.get(value, [])
        if value in self.returned or len(readers) != 1 or readers[0].op_type not in ACTIVATIONS:
            return None
        return readers[0]

    def involved(self, node: onnx.NodeProto) -> Involved:
        """The captured nodes that went into a layer, as our export wrote them down.

        A convolution that was fused with its activation is two nodes or three here, and the
        captured ones stand with the result of the last.
        """
        waiting = [node.output[0]]
        for value in waiting:
            if value in self._stated:
                return Involved(node.op_type, _module(node), tuple(self._stated[value]))
            behind = [reader.output[0] for reader in self.readers.get(value, [])]
            waiting += [each for each in behind if each not in waiting]
        return Involved(node.op_type, _module(node), ())

    def _hands_on(self, node: onnx.NodeProto, held: Collection[str]) -> bool:
        if node.op_type in (*ACTIVATIONS, *MOVES):
            return node.input[0] in held
        return node.op_type in COMBINES and all(name in held for name in node.input)

    def _reason(self, node: onnx.NodeProto) -> str | None:
        if node.op_type == "ConvTranspose":
            return "ONNX Runtime has no int8 kernel for a transposed convolution"
        weights = self.constants.get(node.input[1])
        if weights is None and node.input[0] in self.constants:
            return "its weights are on the left of what they multiply"
        if weights is None:
            return "both of its operands are computed while it runs"
        if weights.data_type != onnx.TensorProto.FLOAT:
            return f"its weights are {onnx.TensorProto.DataType.Name(weights.data_type).lower()}"
        if node.op_type == "MatMul" and len(weights.dims) != 2:
            return f"its weights have {len(weights.dims)} dimensions and not 2"
        if len(node.input) == 3 and node.input[2] not in self.constants:
            return "its bias is computed while it runs"
        if any(each.name in ("alpha", "beta") and each.f != 1.0 for each in node.attribute):
            return "it scales its product or its bias by a number of its own"
        if not np.isfinite(numpy_helper.to_array(weights)).all():
            return "its weights are not all finite"
        return None


def _layers_of(nodes: Iterator[onnx.NodeProto] | Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    return [node for node in nodes if node.op_type in LAYER_TYPES]


def _within(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes inside of branches and loops."""
    for node in graph.node:
        for each in node.attribute:
            for inner in [each.g] if each.HasField("g") else each.graphs:
                yield from inner.node
                yield from _within(inner)


def _stated(model: onnx.ModelProto) -> Mapping[str, Sequence[str]]:
    """Value -> the captured nodes that went into it, as our export wrote them down."""
    text = next((each.value for each in model.metadata_props if each.key == ONNX_LAYERS), "{}")
    return {value: stated["origins"] for value, stated in json.loads(text).items()}


def _module(node: onnx.NodeProto) -> str:
    """The module that a node came from, as torch.onnx notes it; empty where it does not."""
    key = "pkg.torch.onnx.name_scopes"
    text = next((each.value for each in node.metadata_props if each.key == key), "")
    scopes = re.findall(r"'([^']*)'", text)
    return scopes[-2] if len(scopes) > 1 else ""
