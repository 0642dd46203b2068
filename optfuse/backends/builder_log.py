"""Reads TensorRT's verbose build log: the layers of the engine, and the memory it takes.

An engine can only be inspected where it can be loaded, on a GPU like the one it was built for. Its
build log can be read anywhere. With the profiling verbosity DETAILED the builder ends with

    Layers:
    Name: node_conv2d_myl0_1, LayerType: correlation, Inputs: [ ... ], Constants: [ ... ],
    Outputs: [ ... ], TacticName: ..., StreamId: 0,
    Metadata: [ONNX Layer: node_conv2d][ONNX Layer: node_relu]

(each layer on one line, wrapped here), and above it `Total Activation Memory: N bytes` and
`Total Weights Memory: N bytes`. The metadata are the names of the ONNX nodes behind the layer: the
two nodes above became one kernel. Layers that the builder added by itself (a change of layout, a
`signal` or `wait` between streams) have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from optfuse.stages import EngineLayer

_LAYERS = "Layers:"
_ONNX_NODE = "[ONNX Layer: "

# Bounded digits: int() refuses a number of more than 4300 of them.
_ACTIVATIONS = re.compile(r"Total Activation Memory: ([0-9]{1,18})\b")
_WEIGHTS = re.compile(r"Total Weights Memory: ([0-9]{1,18})\b")
_SHAPE = re.compile(r"Dimensions: (\[[0-9,-]*\])")
_DATATYPE = re.compile(r"Datatype: ([^,}\]]+)")
_TACTIC = re.compile(r"TacticName: ([^,]+)")
_STREAM = re.compile(r"StreamId: ([0-9]+)")


@dataclass(frozen=True)
class BuilderLog:
    """What a build log says of the engine.

    Attributes:
        layers: every layer of the finished engine, in the order it runs them; empty where the log
            has no layer table.
        activation_bytes: device memory for what layers hand to each other, or None where the log
            doesn't say.
        weight_bytes: device memory for constants, or None.
    """

    layers: tuple[EngineLayer, ...]
    activation_bytes: int | None
    weight_bytes: int | None


def parse(text: str) -> BuilderLog:
    """Read a whole build log, in time linear in its length.

    Lines that aren't understood are passed over, so that a log cut short or of another version
    gives less, never an error. Where the log has several builds, the last one counts.
    """
    return BuilderLog(_layers(text), _last(_ACTIVATIONS, text), _last(_WEIGHTS, text))


def _last(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None


def _layers(text: str) -> tuple[EngineLayer, ...]:
    latest: list[EngineLayer] = []
    current: list[EngineLayer] | None = None
    # Not splitlines(): it also breaks at the record separator that TensorRT 10 writes between the
    # ONNX nodes of one layer.
    for line in text.split("\n"):
        if line.rstrip().endswith(_LAYERS):
            current = []
        elif current is not None and line.startswith("Name: "):
            layer = _layer(line)
            if layer is not None:
                current.append(layer)
                latest = current
        elif line.strip():
            current = None
    return tuple(latest)


def _layer(line: str) -> EngineLayer | None:
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    kind, separator, rest = rest.partition(", ")
    if not separator:
        return None
    described, separator, metadata = rest.rpartition("Metadata: ")
    if not separator:
        described, metadata = rest, ""
    return EngineLayer(name, kind, onnx_nodes(metadata), _details(described))


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """The names in a layer's metadata, `[ONNX Layer: a][ONNX Layer: b]`, each once; a name may hold
    brackets itself."""
    names = (part.strip() for part in metadata.split(_ONNX_NODE)[1:])
    return tuple(dict.fromkeys(name.removesuffix("]") for name in names))


def _details(described: str) -> str:
    """What comes out of the layer, the kernel that computes it and the stream it runs on."""
    outputs = described.rpartition("Outputs: [")[2]
    shapes, datatypes = _SHAPE.findall(outputs), _DATATYPE.findall(outputs)
    pairs = zip(datatypes, shapes, strict=False)
    parts = [f"{datatype.strip()} {shape}" for datatype, shape in pairs]
    tactic, stream = _TACTIC.search(outputs), _STREAM.search(outputs)
    if tactic:
        parts.append(f"tactic {tactic[1]}")
    if stream:
        parts.append(f"stream {stream[1]}")
    return ", ".join(parts)
