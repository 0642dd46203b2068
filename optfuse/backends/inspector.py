"""The layers of an engine that was loaded on a GPU: what they are made of, and each one's time.

Without a GPU the builder's log says which layers there are; see `builder_log`. On one, the engine
inspector knows the kernels that were really chosen, and the profiler times each layer.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optfuse.backends.builder_log import onnx_nodes
from optfuse.stages import EngineLayer


def inspected(trt: Any, engine: Any, context: Any) -> tuple[EngineLayer, ...]:
    """Every layer of a loaded engine, in its order.

    Args:
        trt: the package.
        engine: an `ICudaEngine`.
        context: an `IExecutionContext` of it whose input shapes are set, so that the inspector
            knows every shape.
    """
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return parse(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def parse(text: str) -> tuple[EngineLayer, ...]:
    """Read the inspector's JSON: `{"Layers": [{"Name": ..., "LayerType": ..., ...}, ...]}`.

    What isn't understood is passed over: another version gives less, never an error. An engine
    that was built without details gives names alone.
    """
    try:
        # Not strict: TensorRT 10 writes bare control characters between the nodes of a layer.
        layers = json.loads(text, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    if not isinstance(layers, list):
        return ()
    return tuple(found for found in map(_layer, layers) if found is not None)


def time_layers(
    trt: Any, context: Any, run: Callable[[], None], layers: Sequence[EngineLayer], runs: int
) -> tuple[EngineLayer, ...]:
    """The same layers with the median time of each.

    Times of layers on several streams overlap, and the profiler puts events around each layer, so
    that they add up to more than the engine takes.

    Args:
        trt: the package.
        context: an `IExecutionContext` of its own, ready to run and without a CUDA graph.
        run: runs it once and waits.
        layers: as inspected.
        runs: how many times; one more comes before them and doesn't count.
    """
    profiler = _profiler(trt)
    run()
    context.profiler = profiler
    for _ in range(runs):
        run()
    medians = {name: statistics.median(times) for name, times in profiler.times.items()}
    return tuple(replace(layer, milliseconds=medians.get(layer.name)) for layer in layers)


def _profiler(trt: Any) -> Any:
    class LayerTimes(trt.IProfiler):  # type: ignore[misc]  # the package is found at run time
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # pybind11 wants its own constructor called by name
            self.times: dict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name].append(ms)

    return LayerTimes()


def _layer(given: Any) -> EngineLayer | None:
    if isinstance(given, str):
        return EngineLayer(given, "")
    if not isinstance(given, Mapping) or not isinstance(given.get("Name"), str):
        return None
    return EngineLayer(
        given["Name"],
        str(given.get("LayerType", "")),
        onnx_nodes(str(given.get("Metadata", ""))),
        _details(given),
    )


def _details(given: Mapping[str, Any]) -> str:
    """What comes out of the layer, its kernel and its stream, as `builder_log` writes it."""
    outputs = given.get("Outputs")
    parts = [_output(each) for each in (outputs if isinstance(outputs, list) else [])]
    for label, key in (("tactic", "TacticName"), ("stream", "StreamId")):
        if given.get(key) not in (None, ""):
            parts.append(f"{label} {given[key]}")
    return ", ".join(part for part in parts if part)


def _output(given: Any) -> str:
    if not isinstance(given, Mapping):
        return ""
    # Two keys in TensorRT 11, one in 10.
    datatype = given.get("Datatype", given.get("Format/Datatype", ""))
    dimensions = given.get("Dimensions")
    shape = f"[{','.join(map(str, dimensions))}]" if isinstance(dimensions, list) else ""
    return f"{datatype} {shape}".strip()
