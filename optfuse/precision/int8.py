"""ONNX file x ranges -> the same network in int8, with its types written into it.

Static, by onnxruntime.quantization: weights are stored in int8 with one scale an output channel,
and a QuantizeLinear and a DequantizeLinear node stand wherever a value is rounded. Inputs and
outputs stay float32.

Where these nodes have to stand differs from engine to engine, and a wrong place costs more than
int8 gains. How many times faster than float32, on one thread of a CPU with VNNI, ONNX Runtime 1.31
and OpenVINO 2026.4; TensorRT builds none of the first three rows, for their zero points:

    rounded                     on           GoogLeNet  MobileNetV2  EfficientNet-B0  ViT-Ti
    results too, uint8          ONNX Runtime    3.1         2.1           0.9          1.7
    results too, uint8          OpenVINO        3.2         2.4           0.9          1.8
    what layers read, uint8     OpenVINO        3.1         2.4           1.6          2.0
    what layers read, int8      OpenVINO        2.9         2.1           1.6          2.1
    what layers read, int8      ONNX Runtime    0.7         0.4           0.4          0.7

So there is one scheme for each, see `SCHEMES`, and a file is for the engines of its scheme alone:
OpenVINO 2026.4 crashes on DenseNet-121 with results rounded, and with values in int8 its outputs of
ShuffleNetV2 are 0.64 away from float32, where ONNX Runtime's of the same file are 0.05 away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from optfuse.errors import EngineError, UsageError
from optfuse.export import EMBED_LIMIT_BYTES, data_file
from optfuse.files import sha256, staged
from optfuse.graph import ONNX_LAYERS
from optfuse.precision.calibration import (
    INFERRED,
    METHOD,
    Ranges,
    calibrate,
    quiet,
    require_onnxruntime,
)
from optfuse.precision.int8_nodes import Layer, Nodes
from optfuse.precision.rules import ASKED
from optfuse.stages import Artifact, Refused, Site, Step

__all__ = ["SCHEMES", "Ranges", "Scheme", "calibrate", "layers", "quantize", "scheme_of"]

SCHEME = "optfuse.int8"
"""Key in an ONNX file's metadata under which it says the name of its scheme."""


@dataclass(frozen=True)
class Scheme:
    """How values are rounded for a family of engines.

    Attributes:
        values: the type of what layers read. `uint8` has a zero point, and so all 256 steps for a
            value that is never negative; `int8` has none.
        results: what layers give is rounded as well, and what only moves or combines such results
            computes in int8: ONNX Runtime has int8 kernels for whole patterns of that kind alone.
        biases: are stored in int32. Where they stay float32, the engine does that by itself.
    """

    values: Literal["uint8", "int8"]
    results: bool
    biases: bool


SCHEMES: Mapping[str, Scheme] = {
    "onnxruntime": Scheme("uint8", results=True, biases=True),
    "openvino": Scheme("uint8", results=False, biases=False),
    "tensorrt": Scheme("int8", results=False, biases=False),
}
"""Name of a scheme, after the engine it is for -> the scheme."""


def scheme_of(engine: str) -> str:
    """The name of the scheme for a backend that reads ONNX files."""
    if "tensorrt" in engine:
        return "tensorrt"
    return engine if engine in SCHEMES else "onnxruntime"


def layers(artifact: Artifact, ranges: Ranges | None = None) -> tuple[str, ...]:
    """The nodes of an ONNX file that can compute in int8, in the file's order.

    Args:
        artifact: what `export` wrote.
        ranges: of its values; given them, a layer whose own can't be used is left out.
    """
    model = onnx.load(artifact.path) if ranges is None else ranges.model
    return tuple(each.name for each in _judged(Nodes(model), ranges) if each.reason is None)


def quantize(
    artifact: Artifact,
    ranges: Ranges,
    path: Path,
    *,
    high: Collection[str] = (),
    scheme: str = "onnxruntime",
) -> Artifact:
    """Write an ONNX file with layers in int8.

    A layer that stays float32 reads what was not rounded, except for results that are rounded where
    they are made.

    Args:
        artifact: what `export` wrote.
        ranges: what `calibrate` gave for it.
        path: of the new file, which appears whole or not at all.
        high: names of layers that stay float32; with all of them the file computes as before.
        scheme: one of `SCHEMES`.

    Raises:
        UsageError: a name in `high` is of no layer, or no layer can compute in int8.
        EngineError: onnxruntime is missing, or cannot write such a file.
        OutputError: the file cannot be written.
    """
    started = time.perf_counter()
    require_onnxruntime()
    chosen = SCHEMES[scheme]
    if ranges.sha256 != artifact.sha256:
        raise ValueError(f"the ranges are not those of {artifact.path}")
    nodes = Nodes(ranges.model)
    judged = _judged(nodes, ranges)
    _check(artifact, judged, high)
    low = [each for each in judged if each.reason is None and each.name not in high]
    model = onnx.ModelProto()
    model.CopyFrom(ranges.model)
    if low:
        model = _rounded(model, nodes, low, judged, ranges, chosen, artifact)
    _sign(model, scheme)
    size_bytes, digest = _write(model, path)
    step = Step(
        stage="precision",
        name="int8",
        seconds=time.perf_counter() - started,
        operators_before=len(ranges.model.graph.node),
        operators_after=len(model.graph.node),
        settings={
            "scheme": scheme,
            "weights": "int8, one scale an output channel",
            "values": chosen.values,
            "calibration": METHOD,
            "samples": ranges.samples,
            "random": ranges.caveat is not None,
        },
        sites=tuple(Site(each.name, each.node.op_type, nodes.involved(each.node)) for each in low),
        refused=tuple(
            Refused(each.name, each.reason or ASKED, nodes.involved(each.node))
            for each in judged
            if each not in low
        ),
    )
    return Artifact(
        path=path,
        kind="onnx",
        sha256=digest,
        size_bytes=size_bytes,
        variant=artifact.variant,
        input_names=artifact.input_names,
        output_names=artifact.output_names,
        trace=(*artifact.trace, step),
    )


def _judged(nodes: Nodes, ranges: Ranges | None) -> list[Layer]:
    """All layers, each with what stands against it, its ranges included."""
    found = nodes.layers()
    if ranges is None:
        return found
    return [
        Layer(each.node, each.reason or _reason_in_ranges(nodes, each, ranges)) for each in found
    ]


def _reason_in_ranges(nodes: Nodes, layer: Layer, ranges: Ranges) -> str | None:
    """Why a layer's values cannot be rounded; None where they can."""
    read, given = layer.values
    cut = nodes.cut_off_by(given)
    for value in (read, cut.output[0] if cut is not None else given):
        if value not in ranges.spans:
            return f"the type of '{value}' is not known"
        smallest, largest = ranges.spans[value]
        if not np.isfinite((smallest, largest)).all():
            return f"'{value}' was NaN or infinite on the calibration data"
        if smallest == largest == 0:
            return f"'{value}' was zero everywhere on the calibration data"
    return None


def _check(artifact: Artifact, judged: Sequence[Layer], high: Collection[str]) -> None:
    possible = [each.name for each in judged if each.reason is None]
    thing = f"'{artifact.path.name}' cannot be written in int8"
    if not possible:
        of_first = (
            f"Of its layers none can; the first, {judged[0].name}: {judged[0].reason}"
            if judged
            else ""
        )
        raise UsageError(
            thing,
            of_first or "It has no convolution, linear layer or product with weights",
            "Choose another precision",
        )
    for name in high:
        if name not in possible:
            close = get_close_matches(name, possible, n=1) or possible[:1]
            raise UsageError(
                thing,
                f"There is no layer '{name}' to keep in float32",
                f"Did you mean '{close[0]}'?",
            )


def _rounded(
    model: onnx.ModelProto,
    nodes: Nodes,
    low: Sequence[Layer],
    judged: Sequence[Layer],
    ranges: Ranges,
    scheme: Scheme,
    artifact: Artifact,
) -> onnx.ModelProto:
    """The model with the layers `low` in int8, as onnxruntime.quantization writes it."""
    names = [each.name for each in low]
    between = nodes.between(names) if scheme.results else []
    chosen = {*names, *between}
    _part_weights(model, nodes, names)
    types = sorted({node.op_type for node in model.graph.node if node.name in chosen})
    # A Gemm gives float32 at no cost, and the last one gives the network's outputs.
    unrounded = ["Gemm"] if scheme.results else types
    try:
        with quiet():
            model = _by_library(model, [*names, *between], types, ranges, scheme, unrounded)
    except Exception as error:  # what it raises is of many kinds
        raise EngineError(
            f"'{artifact.path.name}' cannot be written in int8",
            " ".join(str(error).split()) or type(error).__name__,
            "Choose another precision, or run again with --debug",
        ) from error
    made_rounded = {
        name
        for node in ranges.model.graph.node
        if node.name in chosen and node.op_type not in unrounded
        for name in node.output
    }
    stay = {each.name for each in judged} - set(names)
    _read_unrounded(model, stay, made_rounded)
    return model


def _by_library(
    model: onnx.ModelProto,
    chosen: list[str],
    types: list[str],
    ranges: Ranges,
    scheme: Scheme,
    unrounded: list[str],
) -> onnx.ModelProto:
    from onnxruntime.quantization import (
        CalibrationMethod,
        QDQQuantizer,
        QuantType,
        TensorsData,
    )

    spans = {
        name: (np.float32(smallest), np.float32(largest))
        for name, (smallest, largest) in ranges.spans.items()
        if np.isfinite((smallest, largest)).all()
    }
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if scheme.values == "uint8" else QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, spans),
        nodes_to_quantize=chosen,
        nodes_to_exclude=[],
        op_types_to_quantize=types,
        extra_options={
            "ActivationSymmetric": scheme.values == "int8",
            "QuantizeBias": scheme.biases,
            "OpTypesToExcludeOutputQuantization": unrounded,
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    _rename_cut_off(quantizer.model.model, ranges.model)
    written: onnx.ModelProto = quantizer.model.model
    return written


def _part_weights(model: onnx.ModelProto, nodes: Nodes, low: Collection[str]) -> None:
    """Give whoever else reads the weights of a layer in int8 a copy of its own, which stays as it
    is: the library rounds a tensor for all of its readers."""
    copies = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            readers = nodes.readers[name] if name in nodes.constants else []
            rounded = any(each.name in low and name in each.input[1:] for each in readers)
            if rounded and node.name not in low:
                copies[name] = f"{name}_float32"
                node.input[index] = copies[name]
    for name, copied in copies.items():
        added = model.graph.initializer.add()
        added.CopyFrom(nodes.constants[name])
        added.name = copied


def _read_unrounded(
    model: onnx.ModelProto, stay: Collection[str], made_rounded: Collection[str]
) -> None:
    """Let the layers that stay float32 read what was there before it was rounded for others."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name not in stay:
            continue
        for index, name in enumerate(node.input):
            last = made_by.get(name)
            if last is None or last.op_type != "DequantizeLinear":
                continue
            first = made_by.get(last.input[0])
            if first is not None and not {first.input[0], name} & set(made_rounded):
                node.input[index] = first.input[0]


def _rename_cut_off(model: onnx.ModelProto, before: onnx.ModelProto) -> None:
    """Write down which value is now that of an activation whose node is gone, because the range of
    what it read cuts off at the same numbers."""
    left = {node.name for node in model.graph.node}
    gone = {name for node in before.graph.node if node.name not in left for name in node.output}
    first = {node.input[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    last = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for each in model.metadata_props:
        if each.key == ONNX_LAYERS:
            stated: dict[str, Any] = json.loads(each.value)
            for name in gone & stated.keys() & first.keys():
                stated[last[first[name].output[0]].output[0]] = stated.pop(name)
            each.value = json.dumps(stated)


def _sign(model: onnx.ModelProto, scheme: str) -> None:
    """Write the scheme into the metadata, and take out what the library wrote there for itself."""
    known = {each.key: each.value for each in model.metadata_props if each.key != INFERRED}
    onnx.helper.set_model_props(model, {**known, SCHEME: scheme})


def _write(model: onnx.ModelProto, path: Path) -> tuple[int, str]:
    """The size of all that was written, and the sha256 of the file itself."""
    beside = model.ByteSize() > EMBED_LIMIT_BYTES
    with staged(path.parent) as folder:
        written = folder / path.name
        onnx.save(model, written, save_as_external_data=beside, location=data_file(path).name)
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        digest = sha256(written)
    if not beside:
        data_file(path).unlink(missing_ok=True)  # of a larger file that was here before
    return size_bytes, digest
