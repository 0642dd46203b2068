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
from optfuse.feeds import onnx_names, require_batch, shapes_fed
from optfuse.files import sha256
from optfuse.load import load
from optfuse.stages import (
    Artifact,
    BuildOptions,
    InputSpec,
    LoadedModel,
    Program,
    Source,
    Variant,
)

Kind = Literal["source", "onnx", "engine"]

DEFAULT_ENGINE = {"source": "torch", "onnx": "onnxruntime"}
"""What runs a subject that names no engine; an engine file runs on the one that built it."""

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
            require_batch(thing, batch)
    if backend.builds and thing.kind == "onnx":
        options = BuildOptions(shapes=shapes_fed(thing, subject.inputs, batch))
        [(thing, _), *_] = backend.build(thing, options, folder)
    return thing


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
    inputs, outputs = onnx_names(path)
    return replace(artifact, input_names=inputs, output_names=outputs)
