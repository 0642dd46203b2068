"""What `bench` and `diff` are given: model sources, ONNX files, engines, folders of results.

models/resnet50.py:build             a model source, on eager PyTorch
models/resnet50.py:build@onnxruntime the same, exported as it comes, on ONNX Runtime
model.onnx[@ENGINE]                  an ONNX file, on ONNX Runtime unless said otherwise
x.engine[@ENGINE]                    an engine file; x.engine.json beside it names its engine
out/resnet50[@ENGINE]                what `optfuse optimize` wrote: its two ONNX files
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from optfuse import backends
from optfuse.backends import engine_file
from optfuse.capture import capture
from optfuse.errors import EngineError, LoadError, UsageError
from optfuse.export import export_baseline
from optfuse.files import sha256
from optfuse.graph import flat_inputs
from optfuse.inputs import random_arguments
from optfuse.load import load
from optfuse.onnx_dimensions import dimensions_of
from optfuse.stages import (
    Artifact,
    BuildOptions,
    InputShapes,
    InputSpec,
    LoadedModel,
    Program,
    Source,
    Variant,
)

Kind = Literal["source", "onnx", "engine"]

DEFAULT_ENGINE = {"source": "torch", "onnx": "onnxruntime"}
"""What runs a subject that names no engine; an engine file runs on the one that built it."""

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

_IN_FOLDER: dict[str, Variant] = {"baseline.onnx": "baseline", "model.onnx": "optimized"}


@dataclass(frozen=True)
class Subject:
    """One of the things that are compared.

    Attributes:
        text: as the user typed it; what came out of a folder is written as its own path.
        kind: `source`, `onnx` or `engine`.
        name: short, and unlike that of any other subject of the same call.
        engine: the backend that runs it.
        source: the model's source, where it is one.
        path: the file, where it is one.
        inputs: as the user described them, for what a file leaves open.
    """

    text: str
    kind: Kind
    name: str
    engine: str
    source: Source | None = None
    path: Path | None = None
    inputs: tuple[InputSpec, ...] = ()


def parse_subjects(
    texts: Sequence[str],
    *,
    weights: Path | None = None,
    inputs: tuple[InputSpec, ...] = (),
    seed: int = 0,
    trust: bool = False,
) -> list[Subject]:
    """Read SUBJECT[@ENGINE] arguments; a folder of results becomes its two ONNX files.

    Args:
        texts: as typed.
        weights, inputs, seed, trust: of every model source among them, as in `Source`.

    Raises:
        UsageError: one is nothing that can be compared, or there is no engine of that name.
        LoadError: a file is not there.
        EngineError: an engine file names no engine, and nothing beside it does.
    """
    found = []
    for text in texts:
        what, engine = _split(text)
        source = Source(what, weights=weights, inputs=inputs, seed=seed, trust=trust)
        found += [replace(each, inputs=inputs) for each in _subjects(what, engine, source)]
    return _named_apart(found)


def require_runnable(subject: Subject) -> None:
    """Refuse a subject whose engine cannot run here, before any work is done.

    Raises:
        EngineError: as it says.
    """
    missing = backends.get(subject.engine).cannot_run()
    if missing is not None:
        raise EngineError(
            f"'{subject.name}' cannot be run here",
            "There is no GPU" if missing == "no GPU" else missing,
            "Run it where the GPU is that it was built for"
            if subject.kind == "engine"
            else "Choose an engine that 'optfuse engines' calls ready, with @ENGINE",
        )


def program_of(subject: Subject, batch: int | None = None) -> Program:
    """The captured program of a model source.

    Args:
        subject: of kind `source`.
        batch: the size of the first dimension of its inputs; None for that of its examples.

    Raises:
        UsageError: no input has a first dimension.
        ModelError: it cannot be loaded or captured.
    """
    assert subject.source is not None
    model = load(subject.source)
    return capture(model if batch is None else _with_batch(model, batch))


def opened_by(subject: Subject, folder: Path, batch: int | None = None) -> Program | Artifact:
    """What the subject's engine opens.

    A source is captured, and exported as it comes where the engine reads ONNX; an engine with a
    build step builds for the device that is here, and for the sizes that it will be run with.

    Args:
        subject: one subject.
        folder: where a file that has to be made is put; one folder for each subject and batch.
        batch: as in `program_of`; a file takes what it was exported or built for.

    Raises:
        UsageError: a file was exported or built for other sizes, or leaves a size open that has
            to be known to build an engine.
        ModelError: the model cannot be loaded, captured or exported, or a file cannot be read.
        EngineError: the engine cannot be built, or what lies beside an engine file is missing or
            was changed.
    """
    backend = backends.get(subject.engine)
    thing: Program | Artifact
    if subject.kind == "source":
        thing = program_of(subject, batch)
        if backend.consumes == "program":
            return thing
        thing = export_baseline(thing, folder / f"{thing.name}.onnx")
    else:
        assert subject.path is not None
        thing = _artifact(subject.path, subject.kind)
        if batch is not None:
            _require_batch(thing, batch)
    if backend.builds and thing.kind == "onnx":
        shapes = _shapes_fed(thing, _at_batch(subject.inputs, batch), batch)
        options = BuildOptions(shapes=shapes)
        [(thing, _), *_] = backend.build(thing, options, folder)
    return thing


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


def require_in_range(artifact: Artifact, shapes: Sequence[Sequence[int]]) -> None:
    """Refuse sizes beyond those that an ONNX file was exported for with `optfuse optimize --dim`.

    An engine would mostly run them, though nobody knows what it gives there.

    Args:
        artifact: an engine file says it itself when it is run.
        shapes: of the inputs, in the file's order.

    Raises:
        UsageError: one is beyond.
    """
    dimensions = dimensions_of(_read(artifact.path)) if artifact.kind == "onnx" else {}
    if not dimensions:
        return
    for (_, _, names), shape in zip(onnx_inputs(artifact.path), shapes, strict=True):
        # An engine says it itself where there are more sizes, or fewer.
        for name, size in zip(names, shape, strict=False):
            known = dimensions.get(str(name))
            if known and not known.least <= size <= known.most:
                raise UsageError(
                    f"'{artifact.path}' cannot be run with {name}={size}",
                    f"It was exported for {name} from {known.least} to {known.most}",
                    "Choose a size that it was exported for, or export it for others with 'optfuse "
                    "optimize --dim'",
                )


def onnx_inputs(path: Path) -> list[tuple[str, str, tuple[int | str, ...]]]:
    """Name, dtype and shape of every input of an ONNX file; an open size is its name, or `?`.

    Raises:
        LoadError: it is no ONNX file, or an input is no tensor of a dtype that PyTorch has.
    """
    graph = _read(path).graph
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


def _split(text: str) -> tuple[str, str | None]:
    """`WHAT[@ENGINE]`; an @ that no name of an engine can follow belongs to the path."""
    what, at, engine = text.rpartition("@")
    if not at or not re.fullmatch(r"[a-z][a-z0-9-]*", engine):
        return text, None
    backends.get(engine)
    return what, engine


def _subjects(what: str, engine: str | None, source: Source) -> list[Subject]:
    path = Path(what)
    if path.name == "report.json":
        path = path.parent
    if path.is_dir():
        found = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if not found:
            raise UsageError(
                f"'{what}' cannot be compared with anything",
                f"The folder holds neither of {' and '.join(_IN_FOLDER)}",
                "Give a folder that 'optfuse optimize' wrote, or a file",
            )
        return [_file(_for_engine(each, engine), str(each), engine) for each in found]
    if path.suffix in (".onnx", ".engine"):
        return [_file(path, what, engine)]
    if ":" not in what:
        raise UsageError(
            f"'{what}' cannot be compared with anything",
            "It is no model source, no .onnx or .engine file and no folder of results"
            if path.exists()
            else "There is no such file or folder, and it is not written as a model source",
            "Give path/to/file.py:callable, an .onnx or .engine file, or a folder that 'optfuse "
            "optimize' wrote, each with @ENGINE where it needs one",
        )
    place, _, name = what.rpartition(":")
    short = Path(place).stem if place.endswith(".py") else name
    return [Subject(what, "source", short, engine or DEFAULT_ENGINE["source"], source=source)]


def _for_engine(path: Path, engine: str | None) -> Path:
    """The file beside it that was written for an engine, where there is one: `model.openvino.onnx`.
    In int8 no file suits every engine."""
    family = "tensorrt" if "tensorrt" in (engine or "") else engine
    own = path.with_suffix(f".{family}{path.suffix}")
    return own if own.is_file() else path


def _file(path: Path, text: str, engine: str | None) -> Subject:
    if not path.is_file():
        raise LoadError(
            f"'{text}' cannot be opened",
            "There is no such file",
            "Check the path, or write it again with 'optfuse optimize'",
        )
    kind: Kind = "onnx" if path.suffix == ".onnx" else "engine"
    chosen = engine or DEFAULT_ENGINE.get(kind) or engine_file.read(path).package
    backends.get(chosen)
    parent = path.resolve().parent.name
    return Subject(text, kind, f"{parent}/{path.name}" if parent else path.name, chosen, path=path)


def _named_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """Each subject's short name with its engine, with more of its text where that is not enough,
    and with a number where even that is the same."""
    shown: dict[str, int] = {}
    named = []
    short = [f"{subject.name}@{subject.engine}" for subject in subjects]
    for subject, name in zip(subjects, short, strict=True):
        same = {each.text for each, other in zip(subjects, short, strict=True) if other == name}
        name = name if len(same) == 1 else f"{subject.text}@{subject.engine}"
        shown[name] = shown.get(name, 0) + 1
        number = f" ({shown[name]})" if shown[name] > 1 else ""
        named.append(replace(subject, name=name + number))
    return named


def _with_batch(model: LoadedModel, batch: int) -> LoadedModel:
    """The same model with as many rows in its example inputs: those there are, over and over."""
    from torch.utils import _pytree as pytree

    examples = (tuple(model.example_args), dict(model.example_kwargs))
    tensors = [leaf for leaf in pytree.tree_leaves(examples) if isinstance(leaf, torch.Tensor)]
    rows = next((tensor.shape[0] for tensor in tensors if tensor.ndim), None)
    if not rows:
        raise UsageError(
            f"'{model.name}' cannot be run with --batch {batch}",
            "None of its example inputs has a first dimension",
            "Leave --batch out",
        )

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.ndim or leaf.shape[0] != rows:
            return leaf
        return leaf[torch.arange(batch) % rows]

    args, kwargs = pytree.tree_map(resized, examples)
    return replace(model, example_args=args, example_kwargs=kwargs)


def _artifact(path: Path, kind: Literal["onnx", "engine"]) -> Artifact:
    variant = _IN_FOLDER.get(path.name, "optimized")
    artifact = Artifact(path, kind, sha256(path), path.stat().st_size, variant)
    if kind == "engine":
        return engine_file.named(artifact, engine_file.read(path))
    return replace(
        artifact,
        input_names=tuple(name for name, _, _ in onnx_inputs(path)),
        output_names=tuple(value.name for value in _read(path).graph.output),
    )


def _require_batch(artifact: Artifact, batch: int) -> None:
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
    shapes = _shapes(artifact, specs, batch)
    inputs = onnx_inputs(artifact.path)
    return [
        InputSpec(name, shape, dtype)
        for (name, dtype, _), shape in zip(inputs, shapes, strict=True)
    ]


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


def _shapes_fed(
    artifact: Artifact, specs: Sequence[InputSpec], batch: int | None
) -> tuple[InputShapes, ...]:
    """What an engine is built for: the shape that each open input is run with, and no other."""
    shapes = _shapes(artifact, specs, batch)
    return tuple(
        InputShapes(name, fed, fed, fed)
        for (name, _, shape), fed in zip(onnx_inputs(artifact.path), shapes, strict=True)
        if any(isinstance(size, str) for size in shape)
    )


def _shapes(
    artifact: Artifact, specs: Sequence[InputSpec], batch: int | None
) -> list[tuple[int, ...]]:
    """The shapes that the inputs of an ONNX file are run with."""
    found = [
        _sizes(artifact, given, _spec_for(given, index, specs), batch)
        for index, given in enumerate(onnx_inputs(artifact.path))
    ]
    require_in_range(artifact, found)
    return found


def _at_batch(specs: Sequence[InputSpec], batch: int | None) -> Sequence[InputSpec]:
    """The inputs with as many rows as a batch has: those with the first size of the first one."""
    rows = first_size(specs)
    if batch is None:
        return specs
    return [
        replace(spec, shape=(batch, *spec.shape[1:])) if spec.shape[:1] == (rows,) else spec
        for spec in specs
    ]


def _spec_for(
    given: tuple[str, str, tuple[int | str, ...]], index: int, specs: Sequence[InputSpec]
) -> InputSpec | None:
    """The user's spec of an input: the one with its name, or else the one at its place."""
    named = {spec.name: spec for spec in specs if spec.name is not None}
    unnamed = [spec for spec in specs if spec.name is None]
    if given[0] in named:
        return named[given[0]]
    return unnamed[index] if index < len(unnamed) else None


def _sizes(
    artifact: Artifact,
    given: tuple[str, str, tuple[int | str, ...]],
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
