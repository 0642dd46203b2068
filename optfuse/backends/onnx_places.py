"""What an engine's builder needs to know of an ONNX file: the modules behind its nodes, to explain
an error, and its sha256 with all its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optfuse.files import sha256

_WORD = re.compile(r"[^\s\[\]{}()'\",;]+")
_BUILDERS_OWN = re.compile(r"_myl[0-9]+_[0-9]+$")
"""What TensorRT's compiler puts behind the name of the node that it made a layer of."""


@dataclass(frozen=True)
class OnnxPlace:
    """A node of an ONNX file.

    Attributes:
        node: its name.
        operator: e.g. `Conv`.
        module: the path of the module that it came from; empty where the file doesn't say.
    """

    node: str
    operator: str
    module: str

    def __str__(self) -> str:
        of_module = f" of the module '{self.module}'" if self.module else ""
        return f"the node '{self.node}' ({self.operator}){of_module}"


def place_of(path: Path, name: str) -> OnnxPlace | None:
    """The node of that name in an ONNX file, or None."""
    return next((_place(node) for node in _nodes(path) if node.name == name), None)


def place_in(path: Path, text: str) -> OnnxPlace | None:
    """The first node of an ONNX file that a text names, as TensorRT's messages do, or None."""
    named = {node.name: node for node in _nodes(path) if node.name}
    for word in _words(text):
        if word in named:
            return _place(named[word])
    return None


def external_data(path: Path) -> list[Path]:
    """The other files that an ONNX file keeps weights in, each once; empty where it is no ONNX."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    model = _model(path)
    tensors = [] if model is None else model.graph.initializer
    locations = (
        ExternalDataInfo(tensor).location
        for tensor in tensors
        if isinstance(tensor, onnx.TensorProto) and uses_external_data(tensor)
    )
    return [path.parent / location for location in dict.fromkeys(locations)]


def file_sha256(path: Path) -> str:
    """Of an ONNX file; where it keeps weights in others, of all their digests in a row."""
    digests = [sha256(each) for each in (path, *external_data(path)) if each.is_file()]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _words(text: str) -> Iterator[str]:
    for word in _WORD.findall(text):
        # `{ForeignNode[first...last]}` names two, and a colon or a full stop may follow a name.
        for part in word.split("..."):
            stripped = part.strip(":.+")
            yield stripped
            yield _BUILDERS_OWN.sub("", stripped)


def _place(node: Any) -> OnnxPlace:
    return OnnxPlace(node.name, node.op_type, _module(node))


def _module(node: Any) -> str:
    """As torch.onnx notes it: `['', 'features', 'features.stem', 'conv2d']`, the node's own name
    last."""
    scopes = next(
        (each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes"), ""
    )
    found = re.findall(r"'([^']*)'", scopes)
    return found[-2] if len(found) > 1 else ""


def _nodes(path: Path) -> list[Any]:
    model = _model(path)
    return [] if model is None else list(model.graph.node)


def _model(path: Path) -> Any:
    """The file without the weights that lie in others; None where it cannot be read, since what is
    told of it here only explains another error."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception:  # protobuf's and the file system's own
        return None
