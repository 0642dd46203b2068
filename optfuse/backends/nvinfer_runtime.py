"""How a loaded engine of the TensorRT family is set up to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optfuse.backends.nvinfer_cache import CacheFile, RuntimeCache


@dataclass(frozen=True)
class Running:
    """What runs an engine.

    Attributes:
        context: an `IExecutionContext`; None where there was no room for it.
        to_profile: gives another one, set up alike but for CUDA graphs, to time its layers on.
        records: whether a CUDA graph is still to be recorded by whoever runs it.
        at_the_end: to be called when it has run for the last time, or None.
    """

    context: Any
    to_profile: Callable[[], Any]
    records: bool = True
    at_the_end: Callable[[], None] | None = None


def compiling_context(trt: Any, engine: Any, file: CacheFile | None) -> Running:
    """A context of TensorRT for RTX, which compiles an engine's kernels when it is loaded.

    Args:
        trt: the package.
        engine: an `ICudaEngine`.
        file: where the kernels are kept for the next time, or None.
    """
    config = _config(trt, engine)
    cache = None if file is None else RuntimeCache(config, file)
    # From version 1.2 on it records CUDA graphs by itself, when its kernels are there.
    records_itself = hasattr(trt, "CudaGraphStrategy")
    if records_itself:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

    def to_profile() -> Any:
        alike = _config(trt, engine)
        if cache is not None:
            cache.share(alike)
        return engine.create_execution_context(alike)

    return Running(
        engine.create_execution_context(config),
        to_profile,
        records=not records_itself,
        at_the_end=None if cache is None else cache.keep,
    )


def _config(trt: Any, engine: Any) -> Any:
    config = engine.create_runtime_config()
    # The kernels for a shape are compiled before it runs first: no run is timed on a stand-in.
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return config
