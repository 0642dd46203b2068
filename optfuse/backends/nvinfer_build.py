"""From an ONNX file to the bytes of an engine, with either package of the TensorRT family.

Neither package raises when a parse or a build fails: it hands back None or False and tells its
logger why. So every call here that can fail reads its reason out of the log.

Precision is what the ONNX file says, and TF32 is off. Weight streaming stays as the builder has it
by itself, which is off in both packages: the whole engine lies in GPU memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optfuse.backends.engine_file import EngineInput
from optfuse.backends.nvidia import capability
from optfuse.backends.nvinfer_log import (
    build_failure,
    errors_of,
    parse_failure,
    profile_failure,
    sentence_of,
)
from optfuse.backends.nvinfer_session import TORCH_DTYPES
from optfuse.backends.profiles import add_profile, check_network
from optfuse.errors import EngineError, UsageError
from optfuse.stages import BuildOptions, InputShapes

LEAVE_OUT = "Change the model at that place, or leave this engine out"

_LEAN_RUNTIME = "nvinfer_lean"
"""The library that an engine for later versions carries; not every package brings it along."""

_OLDEST_COMPATIBLE = 80
"""The first compute capability that tensorrt builds for later ones from: Ampere's."""


def network_flags(trt: Any) -> int:
    """TensorRT 10 needs a flag for networks whose precision is their own; 11 knows no others, and
    may lack it."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strongly_typed is None else 1 << int(strongly_typed)


def parsed_network(
    trt: Any, builder: Any, log: Any, onnx: Path, shapes: Sequence[InputShapes], failed: str
) -> Any:
    """The network in an ONNX file, whose inputs the shapes fit.

    Raises:
        EngineError: the file isn't there or isn't understood, or an input has open dimensions and
            is given no shapes.
        UsageError: the shapes are not those of the network's inputs.
    """
    if not onnx.is_file():
        raise EngineError(failed, f"There is no file {onnx}", "Export the model first")
    network = builder.create_network(network_flags(trt))
    # It owns the weights until the engine is built: the bindings let the network keep it alive.
    parser = trt.OnnxParser(network, log)
    # By path: weights in a second file are found beside it.
    if not parser.parse_from_file(str(onnx)):
        cause = (
            parse_failure(parser.get_error(0), onnx)
            if parser.num_errors
            else sentence_of(errors_of(log.messages)[-1:])
        )
        raise EngineError(failed, cause, LEAVE_OUT)
    if network.num_outputs == 0:  # the parser's answer to a file that holds no ONNX at all
        raise EngineError(failed, "The file holds no ONNX graph", "Export the model again")
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    check_network({each.name: tuple(each.shape) for each in inputs}, shapes, failed)
    return network


def inputs_of(network: Any, order: Sequence[str]) -> tuple[EngineInput, ...]:
    """The inputs of a network, in the program's order where that names them all."""
    found = [network.get_input(index) for index in range(network.num_inputs)]
    inputs = {
        each.name: EngineInput(
            each.name, TORCH_DTYPES.get(each.dtype.name, each.dtype.name), tuple(each.shape)
        )
        for each in found
    }
    return tuple(inputs[name] for name in (order if set(order) == set(inputs) else inputs))


def configuration(trt: Any, builder: Any, options: BuildOptions, failed: str) -> Any:
    """What both packages' builders are told alike.

    Raises:
        EngineError: the package refuses the shapes.
    """
    config = builder.create_builder_config()
    # On by default: it would round the inputs of every convolution to 10 bits of mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    add_profile(builder, config, options.shapes, failed)
    return config


def target_capabilities(trt: Any, config: Any, targets: Sequence[str]) -> bool:
    """Tell a builder that builds ahead of time which compute capabilities to build for.

    Args:
        trt: the package.
        config: the builder's.
        targets: the one asked for first, then others that should run the engine too; those that
            this version doesn't know are left out.

    Returns:
        Whether the first one can be built for.
    """
    known = [
        (target, found)
        for target in targets
        if (found := getattr(trt.ComputeCapability, target.replace("_", "").upper(), None))
        is not None
    ]
    if not known or known[0][0] != targets[0]:
        return False
    config.num_compute_capabilities = len(known)
    accepted = [
        config.set_compute_capability(found, index) for index, (_, found) in enumerate(known)
    ]
    return all(accepted)


def check_gpu_for_later_ones(engine: str, target: str) -> None:
    """Whether a builder that builds on the GPU itself can build there for later ones too.

    Raises:
        UsageError: it cannot.
    """
    if capability(target) < _OLDEST_COMPATIBLE:
        raise UsageError(
            f"--hardware-compatible cannot be used with {engine} here",
            f"It builds for later GPUs from sm_{_OLDEST_COMPATIBLE} on, and the GPU here is "
            f"{target}",
            f"Leave the option out, or build on a GPU of sm_{_OLDEST_COMPATIBLE} or later",
        )


def build_for_later_gpus(trt: Any, config: Any, failed: str) -> str:
    """Tell a builder that builds on the GPU itself that later GPUs should run the engine too.

    Returns:
        The least compute capability that will run it.

    Raises:
        EngineError: it cannot.
    """
    levels = getattr(trt, "HardwareCompatibilityLevel", None)
    if levels is None:
        raise EngineError(
            failed,
            "This version of the package doesn't know hardware compatibility",
            "Leave hardware compatibility out",
        )
    config.hardware_compatibility_level = levels.AMPERE_PLUS
    return f"sm_{_OLDEST_COMPATIBLE}"


def checked_plan(plan: Any, messages: Sequence[tuple[str, str]], onnx: Path, failed: str) -> Any:
    """The engine that a builder gave, if it gave one that can run.

    Raises:
        EngineError: it gave none, or one that cannot run at a shape of its profile.
    """
    out_of_range = profile_failure(messages, onnx)
    if out_of_range:
        raise EngineError(failed, out_of_range, "Give --dim a range that the model can run at")
    if plan is not None:
        return plan
    if any(_LEAN_RUNTIME in error for error in errors_of(messages)):
        raise EngineError(
            failed,
            "An engine for later versions carries the package's lean runtime "
            f"(lib{_LEAN_RUNTIME}), which is not installed",
            "Install it, where NVIDIA offers it, or leave version compatibility out",
        )
    raise EngineError(failed, build_failure(messages, onnx), LEAVE_OUT)


@contextlib.contextmanager
def no_traceback(failed: str) -> Iterator[None]:
    """The bindings raise where a constructor gives nothing, e.g. for want of memory."""
    try:
        yield
    except (TypeError, RuntimeError, MemoryError) as error:
        cause = sentence_of([str(error)]) if str(error) else "It ran out of memory"
        raise EngineError(failed, cause, LEAVE_OUT) from error
