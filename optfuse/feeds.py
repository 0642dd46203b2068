"""What a program, an ONNX file or an engine file is run with: random inputs of the sizes that the
user asked for, as far as it takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optfuse.backends import engine_file
from optfuse.errors import LoadError, UsageError
from optfuse.graph import flat_inputs
from optfuse.inputs import random_arguments
from optfuse.onnx_dimensions import dimensions_of
from optfuse.stages import Artifact, InputShapes, InputSpec, Program

OnnxInput = tuple[str, str, tuple[int | str, ...]]
"""Name, dtype and shape of an input of an ONNX file; an open size is its name, or `?`."""

ELEMENT_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}
"""The number in onnx.TensorProto.DataType -> PyTorch's name, for what an `--input` can be."""


def feeds_of(
    thing: Program | Artifact,
    specs: Sequence[InputSpec] = (),
    seed: int = 0,
    batch: int | None = None,
) -> list[torch.Tensor]:
    """Inputs for it: a program's own examples, or random ones that fit a file.

    Args:
        thing: what `opened_by` gave.
        specs: inputs as the user described them, by name or in order; they decide over what a
            file leaves open, and must fit what it does not. Without them, an engine is given the
            sizes that it is fastest at.
        seed: of the random numbers.
        batch: the size of a first dimension that a file leaves open, whatever the specs say of it.

    Returns:
        CPU tensors in the order of its inputs.

    Raises:
        UsageError: a size is not known, or the specs do not fit the file; see `require_in_range`.
        EngineError: what lies beside an engine file is missing or was changed.
    """
    if isinstance(thing, Program):
        leaves = flat_inputs(thing.graph_module, thing.example_args, thing.example_kwargs)
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    wanted = _of_engine if thing.kind == "engine" else _of_onnx
    args, _ = random_arguments(
        [replace(spec, name=None) for spec in wanted(thing, _at_batch(specs, batch), batch)], seed
    )
    return list(args)


def first_size(specs: Sequence[InputSpec]) -> int | str | None:
    """The first dimension of the first of these inputs that has one: a batch has its size. Those
    without a name come first, as they do in a call."""
    ordered = sorted(specs, key=lambda spec: spec.name is not None)
    return next((spec.shape[0] for spec in ordered if spec.shape), None)


def require_in_range(artifact: Artifact, runs: Iterable[Sequence[torch.Tensor]]) -> None:
    """Refuse sizes beyond those that an ONNX file was exported for with `optfuse optimize --dim`.

    An engine would mostly run them, though nobody knows what it gives there.

    Args:
        artifact: an engine file says it itself when it is run.
        runs: the inputs of each, in the file's order.

    Raises:
        UsageError: one is beyond.
    """
    if artifact.kind == "onnx":
        model = _read(artifact.path)
        for shapes in dict.fromkeys(tuple(tuple(feed.shape) for feed in run) for run in runs):
            _require_in_range(artifact.path, model, shapes)


def onnx_inputs(path: Path) -> list[OnnxInput]:
    """Every input of an ONNX file.

    Raises:
        LoadError: it is no ONNX file, or an input is no tensor of a dtype that PyTorch has.
    """
    return _inputs_in(_read(path), path)


def onnx_names(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the inputs and the outputs of an ONNX file are called.

    Raises:
        LoadError: as `onnx_inputs`.
    """
    model = _read(path)
    inputs = tuple(name for name, _, _ in _inputs_in(model, path))
    return inputs, tuple(value.name for value in model.graph.output)


def _require_in_range(path: Path, model: Any, shapes: Sequence[Sequence[int]]) -> None:
    dimensions = dimensions_of(model)
    for (_, _, names), shape in zip(_inputs_in(model, path), shapes, strict=True):
        # An engine says it itself where there are more sizes, or fewer.
        for name, size in zip(names, shape, strict=False):
            known = dimensions.get(str(name))
            if known and not known.least <= size <= known.most:
                raise UsageError(
                    f"'{path}' cannot be run with {name}={size}",
                    f"It was exported for {name} from {known.least} to {known.most}",
                    "Choose a size that it was exported for, or export it for others with 'optfuse "
                    "optimize --dim'",
                )


def _inputs_in(model: Any, path: Path) -> list[OnnxInput]:
    graph = model.graph
    constants = {each.name for each in graph.initializer}
    found = []
    for value in graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        if tensor.elem_type not in ELEMENT_TYPES:
            raise LoadError(
                f"'{path}' cannot be given inputs",
                f"Its input '{value.name}' is no tensor of a dtype that PyTorch has",
                "Change the model so that all its inputs are tensors of numbers",
            )
        shape = tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param or "?"
            for size in tensor.shape.dim
        )
        found.append((value.name, ELEMENT_TYPES[tensor.elem_type], shape))
    return found


def require_batch(artifact: Artifact, batch: int) -> None:
    """Refuse a batch that a file was not exported or built for.

    Raises:
        UsageError: it was not.
        LoadError: it is no ONNX file.
        EngineError: what lies beside an engine file is missing or was changed.
    """
    thing = f"'{artifact.path}' cannot be run with --batch {batch}"
    if artifact.kind == "engine":
        for least, most in _batches(engine_file.read(artifact.path)):
            if not least <= batch <= most:
                sizes = f"a batch of {least}" if least == most else f"batches of {least} to {most}"
                raise UsageError(
                    thing,
                    f"It was built for {sizes}",
                    "Choose a batch that it was built for, or build it for others with 'optfuse "
                    "optimize --dim'",
                )
        return
    shapes = [shape for _, _, shape in onnx_inputs(artifact.path)]
    fixed = [shape[0] for shape in shapes if shape and isinstance(shape[0], int)]
    if any(size != batch for size in fixed):
        raise UsageError(
            thing,
            f"It was exported for a batch of {fixed[0]}",
            "Give the model's source instead, which is exported anew for every batch, or an ONNX "
            "file with an open first dimension",
        )


def _batches(built: engine_file.Built) -> list[tuple[int, int]]:
    """The least and the largest first dimension of each input whose first one is open; of every
    input where there is none."""
    fixed = [(each.shape[0], each.shape[0]) for each in built.inputs if each.shape]
    names = {each.name for each in built.inputs if each.shape[:1] == (-1,)}
    return [(each.least[0], each.most[0]) for each in built.shapes if each.name in names] or fixed


def _read(path: Path) -> Any:
    """An ONNX model without the weights that lie in other files."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's and the file system's own
        raise LoadError(
            f"'{path}' cannot be read",
            f"It is no ONNX file: {type(error).__name__}",
            "Export the model again",
        ) from error
    if not model.graph.output:  # protobuf reads nearly anything
        raise LoadError(
            f"'{path}' cannot be read", "It holds no ONNX graph", "Export the model again"
        )
    return model


def _of_onnx(artifact: Artifact, specs: Sequence[InputSpec], batch: int | None) -> list[InputSpec]:
    """The inputs that an ONNX file is run with."""
    fed = _fed(artifact, specs, batch)
    return [InputSpec(name, shape, dtype) for (name, dtype, _), shape in fed]


def _of_engine(
    artifact: Artifact, specs: Sequence[InputSpec], batch: int | None
) -> list[InputSpec]:
    """The inputs that an engine is run with; whether its profile holds them, it says itself."""
    built = engine_file.read(artifact.path)
    found = []
    for index, usual in enumerate(engine_file.usual_inputs(built)):
        shape = built.inputs[index].shape
        given = (str(usual.name), usual.dtype, tuple("?" if size < 0 else size for size in shape))
        spec = _spec_for(given, index, specs)
        if spec is None and batch is not None and shape[:1] == (-1,):
            spec = replace(usual, shape=(batch, *usual.shape[1:]))
        found.append(replace(usual, shape=_sizes(artifact, given, spec or usual, None)))
    return found


def shapes_fed(
    artifact: Artifact, specs: Sequence[InputSpec], batch: int | None
) -> tuple[InputShapes, ...]:
    """What an engine is built for: the shape that each open input is run with, and no other.

    Raises:
        UsageError: a size is not known, or the specs do not fit the file; see `require_in_range`.
    """
    return tuple(
        InputShapes(name, shape, shape, shape)
        for (name, _, exported), shape in _fed(artifact, _at_batch(specs, batch), batch)
        if any(isinstance(size, str) for size in exported)
    )


def _fed(
    artifact: Artifact, specs: Sequence[InputSpec], batch: int | None
) -> list[tuple[OnnxInput, tuple[int, ...]]]:
    """The inputs of an ONNX file, and the shapes that they are run with."""
    model = _read(artifact.path)
    inputs = _inputs_in(model, artifact.path)
    shapes = [
        _sizes(artifact, given, _spec_for(given, index, specs), batch)
        for index, given in enumerate(inputs)
    ]
    _require_in_range(artifact.path, model, shapes)
    return list(zip(inputs, shapes, strict=True))


def _at_batch(specs: Sequence[InputSpec], batch: int | None) -> Sequence[InputSpec]:
    """The inputs with as many rows as a batch has: those with the first size of the first one."""
    rows = first_size(specs)
    if batch is None:
        return specs
    return [
        replace(spec, shape=(batch, *spec.shape[1:])) if spec.shape[:1] == (rows,) else spec
        for spec in specs
    ]


def _spec_for(given: OnnxInput, index: int, specs: Sequence[InputSpec]) -> InputSpec | None:
    """The user's spec of an input: the one with its name, or else the one at its place."""
    named = {spec.name: spec for spec in specs if spec.name is not None}
    unnamed = [spec for spec in specs if spec.name is None]
    if given[0] in named:
        return named[given[0]]
    return unnamed[index] if index < len(unnamed) else None


def _sizes(
    artifact: Artifact,
    given: OnnxInput,
    spec: InputSpec | None,
    batch: int | None,
) -> tuple[int, ...]:
    """The shape of an input with every size known.

    Raises:
        UsageError: one stays open, or the user's spec contradicts the file.
    """
    name, dtype, shape = given
    written = "x".join(str(size) for size in shape) or "scalar"
    if spec is not None:
        fits = len(spec.shape) == len(shape) and all(
            isinstance(size, str) or size == wanted
            for size, wanted in zip(shape, spec.shape, strict=True)
        )
        if not fits or spec.dtype != dtype:
            raise UsageError(
                f"The --input for '{name}' does not fit '{artifact.path}'",
                f"The file takes {written}:{dtype}",
                "Give that, with a number for every size that the file leaves open",
            )
        shape = spec.shape
    elif batch is not None and shape and isinstance(shape[0], str):
        shape = (batch, *shape[1:])
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) < len(shape):
        raise UsageError(
            f"The input '{name}' of '{artifact.path}' has no fixed shape",
            f"The file takes {written}:{dtype}",
            f"Give it with --input {name}=SHAPE:{dtype}",
        )
    return sizes
