"""The layers of an ONNX file, by exposing what lies between its inputs and its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from optfuse.float64 import widened
from optfuse.layers.drifts import LIMIT, Exact, Place, Reference, drifts, row
from optfuse.layers.onnx_float64 import run_model_float64
from optfuse.layers.onnx_names import places_in, same_names
from optfuse.layers.onnx_part import OnnxParts
from optfuse.layers.programs import Captured, ProgramReference, fed, running_in_step
from optfuse.stages import LayerDrift, LayerDrifts, Program

EXPOSED_BYTES = 256 * 2**20
"""How much of the values in between is asked for in one run. Their exact counterparts are held
beside them, in float64."""


def compare_file(
    reference: Program,
    path: Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    feeds: Sequence[torch.Tensor],
    *,
    engine: str = "onnxruntime",
    threads: int = 1,
    limit: float = LIMIT,
    seed: int = 0,
) -> LayerDrifts:
    """Compare an ONNX file that was exported from a program with it, layer by layer.

    What lies between the file's inputs and outputs is made an output, so that the engine hands it
    over. That keeps the engine from fusing across these values: each layer's own error is that of
    the engine's kernels, not of the file exactly as it would be deployed. Then each layer is run
    once more with the reference's values for inputs.

    Which value stands for which captured node is written down in the files that optfuse exports;
    of other files by torch.onnx it follows from their names, where operators and inputs agree.

    Args:
        reference: the captured program, which is run in float64 and in its own precision.
        path: of the file.
        args, kwargs: inputs of the program.
        feeds: the same in the order of the file's inputs.
        engine: the backend that runs the file: one of ONNX Runtime's.
        threads: of the engine.
        limit: the growth from which a layer is a suspect.
        seed: for operators that draw random numbers.

    Raises:
        LoadError: the file or its weights cannot be read.
        ModelError: the program cannot be run in float64.
        EngineError: the engine cannot run the file.
    """
    with OnnxParts(path, engine, threads) as parts:
        places = places_in(parts.model, Captured(reference.graph_module))
        wanted = [place.target for place in places]
        exact = ProgramReference(reference, args, kwargs, wanted, seed=seed)
        with running_in_step(reference.name):
            rows = _compared(parts, places, exact, dict(zip(parts.inputs, feeds, strict=True)))
            return drifts(rows, engine, exact.name, limit)


def compare_files(
    reference: Path,
    path: Path,
    feeds: Sequence[torch.Tensor],
    *,
    engine: str = "onnxruntime",
    reference_engine: str = "onnxruntime",
    threads: int = 1,
    limit: float = LIMIT,
) -> LayerDrifts:
    """Compare an ONNX file with another one, where values have the same name and shape in both.

    The reference is what the other file gives when it runs, not float64. The inputs are in its
    order, and go to the inputs of the same names where the file has those. The rest is as in
    `compare_file`.

    Raises:
        LoadError: a file or its weights cannot be read.
        EngineError: an engine cannot run one.
    """
    its = OnnxParts(reference, reference_engine, threads)
    parts = OnnxParts(path, engine, threads)
    with its, parts:
        inputs = dict(zip(its.inputs, feeds, strict=True))
        exact = FileReference(its, inputs)
        if inputs.keys() != set(parts.inputs):
            inputs = dict(zip(parts.inputs, feeds, strict=True))
        places = same_names(parts.model, its.model)
        return drifts(_compared(parts, places, exact, inputs), engine, exact.name, limit)


def compare_with_float64(
    path: Path,
    feeds: Sequence[torch.Tensor],
    *,
    engine: str = "onnxruntime",
    threads: int = 1,
    limit: float = LIMIT,
) -> LayerDrifts:
    """Compare an ONNX file as an engine runs it with itself in float64, as `run_file_float64` does.

    Raises:
        LoadError: the file or its weights cannot be read.
        ModelError: it cannot be run in float64.
        EngineError: the engine cannot run it.
    """
    with OnnxParts(path, engine, threads) as parts:
        inputs = dict(zip(parts.inputs, feeds, strict=True))
        exact = Float64Reference(parts, inputs)
        places = same_names(parts.model, parts.model)
        return drifts(_compared(parts, places, exact, inputs), engine, exact.name, limit)


class FileReference:
    """An ONNX file as an engine runs it."""

    def __init__(self, parts: OnnxParts, inputs: Mapping[str, torch.Tensor]) -> None:
        self.name = f"{parts.path.name} as {parts.engine} runs it"
        self._parts = parts
        self._inputs = inputs
        self._held: dict[str, Exact] = {}

    def hold(self, targets: Sequence[str]) -> None:
        """Run the file as far as these values."""
        for name, found in self._run(targets).items():
            self._held[name] = Exact(found.to(widened(found.dtype)))

    def exact(self, target: str) -> Exact:
        """What that value is; it is held."""
        return self._held[target]

    def release(self, target: str) -> None:
        """Forget that value."""
        del self._held[target]

    def _run(self, targets: Sequence[str]) -> Mapping[str, torch.Tensor]:
        return self._parts.run(targets, self._inputs)


class Float64Reference(FileReference):
    """An ONNX file in float64."""

    def __init__(self, parts: OnnxParts, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__(parts, inputs)
        self.name = f"{parts.path.name} in float64"

    def _run(self, targets: Sequence[str]) -> Mapping[str, torch.Tensor]:
        part = self._parts.part(targets, self._inputs)
        found = run_model_float64(part, self._parts.path, self._inputs)
        return dict(zip(targets, found, strict=True))


def _compared(
    parts: OnnxParts,
    places: Sequence[Place],
    reference: Reference,
    inputs: Mapping[str, torch.Tensor],
) -> Iterator[LayerDrift]:
    """Every place's row, so many places at a time that what is held stays bounded."""
    handed_in = dict(inputs)
    chunks = list(_chunks(parts.model, places))
    still_read = _still_read(parts, chunks)
    for chunk, needed_later in zip(chunks, still_read, strict=True):
        names = [place.name for place in chunk]
        reference.hold([place.target for place in chunk])
        values = parts.run(names, inputs)
        for place in chunk:
            handed_in[place.name] = fed(reference.exact(place.target).value, values[place.name])
        alone = parts.run(names, handed_in)
        for place in chunk:
            exact, value = reference.exact(place.target), values[place.name]
            if value.shape == exact.value.shape:
                types = parts.types_read(place.name, handed_in)
                yield row(place, exact, value, alone[place.name], types)
            reference.release(place.target)
        for name in handed_in.keys() - needed_later - inputs.keys():
            del handed_in[name]


def _chunks(model: onnx.ModelProto, places: Sequence[Place]) -> Iterator[list[Place]]:
    """Places in their order, as many at a time as may be asked for in one run."""
    sizes = _sizes(model)
    chunk: list[Place] = []
    left = EXPOSED_BYTES
    for place in places:
        # What has no known size is taken for a 64th of what may be asked for.
        size = sizes.get(place.name, EXPOSED_BYTES // 64)
        if chunk and size > left:
            yield chunk
            chunk, left = [], EXPOSED_BYTES
        chunk.append(place)
        left -= size
    if chunk:
        yield chunk


def _still_read(parts: OnnxParts, chunks: Sequence[Sequence[Place]]) -> list[set[str]]:
    """For each chunk, the names of the values that later ones are fed with."""
    known = [place.name for chunk in chunks for place in chunk]
    found: list[set[str]] = []
    later: set[str] = set()
    for chunk in reversed(chunks):
        found.append(set(later))
        later |= parts.reads([place.name for place in chunk], known)
    return found[::-1]


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every value whose shape the file tells."""
    sizes: dict[str, int] = {}
    for value in (*model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        shape = [size.dim_value for size in tensor.shape.dim]
        if tensor.HasField("shape") and all(shape):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            sizes[value.name] = math.prod(shape) * dtype.itemsize
    return sizes
