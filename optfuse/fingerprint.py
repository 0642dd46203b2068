"""Whether two programs, or two ONNX files, are the same but for names: then measuring one will do.

Equal fingerprints mean the same operators on the same constants in the same order. Unequal ones may
still mean the same computation, written down in another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from optfuse.graph import attribute
from optfuse.stages import Program

DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
"""Where an onnx.TensorProto can have its elements besides `raw_data`."""

CONVOLUTIONS = ("Conv", "ConvTranspose")


def of_tensor(tensor: torch.Tensor) -> str:
    """Of a tensor's type, shape, layout, device and bits."""
    what = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(what.encode() + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def of_program(program: Program) -> str:
    """Of a program's graph and constants; its example inputs and its trace do not count.

    The names of its constants do: passes give the same ones every time.
    """
    lines = [
        module.code
        for module in program.graph_module.modules()
        if isinstance(module, fx.GraphModule)
    ]
    for node in program.graph_module.graph.find_nodes(op="get_attr"):
        found = attribute(program.graph_module, str(node.target))
        if isinstance(found, torch.Tensor):
            lines.append(f"{node.target} {of_tensor(found)}")
    return _of_lines(lines)


def of_onnx(path: Path) -> str:
    """Of an ONNX file's inputs, operators and constants; names and annotations do not count.

    A value is known by the operator it comes from, an input by its place. A convolution's
    `kernel_shape` does not count beside a constant weight, which says it as well.
    """
    import onnx

    model = onnx.load(path)
    inside = any(each.HasField("g") for node in model.graph.node for each in node.attribute)
    if inside or model.functions:  # their names reach beyond the graph they stand in
        return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return _of_lines(_onnx_lines(model))


def _of_lines(lines: Iterator[str] | list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _onnx_lines(model: Any) -> Iterator[str]:
    yield from sorted(f"{opset.domain} {opset.version}" for opset in model.opset_import)
    constants = {tensor.name: _of_onnx_tensor(tensor) for tensor in model.graph.initializer}
    names = dict(constants)
    for number, value in enumerate(model.graph.input):
        names.setdefault(value.name, f"input {number}")
        yield f"{names[value.name]} {value.type.SerializeToString(deterministic=True).hex()}"
    for number, node in enumerate(model.graph.node):
        taken = [names.get(name) for name in node.input]
        given = [bool(name) for name in node.output]
        yield f"{node.domain} {node.op_type} {taken} {given}"
        sized = node.op_type in CONVOLUTIONS and node.input[1] in constants
        for each in sorted(node.attribute, key=lambda one: str(one.name)):
            if each.name == "kernel_shape" and sized:
                continue
            each.ClearField("doc_string")
            plain = each.SerializeToString(deterministic=True).hex()
            yield f"{each.name} {_of_onnx_tensor(each.t) if each.HasField('t') else plain}"
        names.update((name, f"{number} {at}") for at, name in enumerate(node.output) if name)
    yield str([names.get(value.name) for value in model.graph.output])


def _of_onnx_tensor(tensor: Any) -> str:
    digest = hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)}".encode())
    digest.update(tensor.raw_data)
    for name in DATA:
        digest.update(str(list(getattr(tensor, name))).encode())
    return digest.hexdigest()
