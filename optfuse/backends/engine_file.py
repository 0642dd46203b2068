"""An engine file, and what lies beside it: `x.engine` and `x.engine.json`.

An engine runs native code in this process, and neither package says much about one that is damaged
or foreign. So every engine is written with a description of what it is and where it runs, and is
opened only where both fit: nothing of a file reaches the package before.

The description guards against a mix-up, a broken copy and a change by hand. It is no signature:
whoever can write both files can forge both, so open only engines from where you would run programs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optfuse.backends.nvidia import capability
from optfuse.errors import EngineError, OutputError
from optfuse.files import staged
from optfuse.stages import Artifact, BuildOptions, InputShapes, InputSpec
from optfuse.version import __version__

FORMAT = 1
"""Of the description; another one is refused."""

_LARGEST_BYTES = 1 << 24
"""A description is a few thousand bytes; a file beyond this is none."""

_BUILD_AGAIN = "Build it again with 'optfuse optimize'"


@dataclass(frozen=True)
class EngineInput:
    """An input of an engine: its name, PyTorch's name of its dtype, and -1 for an open size."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """What an engine file is.

    Attributes:
        onnx_sha256: of the ONNX file that it was built from, with its second files.
        package, version: that built it, e.g. `tensorrt-rtx`, `1.7.1.116`.
        target: the compute capability that it was built for, e.g. `sm_89`.
        device: the GPU's name, where it was built for that GPU alone.
        oldest_target: the least compute capability that can run it, where later ones can too.
        shapes: its profile.
        version_compatible, hardware_compatible: as in `BuildOptions`.
        inputs: in the program's order.
        outputs: their names in the program's order.
        optfuse: the version of optfuse that wrote it.
    """

    onnx_sha256: str
    package: str
    version: str
    target: str
    device: str | None
    oldest_target: str
    shapes: tuple[InputShapes, ...]
    version_compatible: bool
    hardware_compatible: bool
    inputs: tuple[EngineInput, ...]
    outputs: tuple[str, ...]
    optfuse: str = __version__


@dataclass(frozen=True)
class Here:
    """What would run an engine here: package, version, compute capability and name of the GPU."""

    package: str
    version: str
    target: str
    device: str


def description_of(engine: Path) -> Path:
    """Where the description of an engine file lies: beside it, `x.engine.json`."""
    return engine.with_name(engine.name + ".json")


def write(engine: Path, content: bytes | memoryview, built: Built) -> str:
    """Write an engine and its description, both or neither.

    Returns:
        The sha256 of the engine.

    Raises:
        OutputError: they cannot be written; an older engine there may not be opened any more.
    """
    digest = hashlib.sha256(content).hexdigest()
    said = {"format": FORMAT, "engine_sha256": digest, **asdict(built)}
    text = json.dumps({**said, "sha256": _digest(said)}, indent=2) + "\n"
    description = description_of(engine)
    try:
        # Moved to their place in this order: the description, then the engine.
        with staged(engine.parent) as folder:
            (folder / engine.name).write_bytes(content)
            (folder / description.name).write_text(text, encoding="utf-8")
    except OutputError:
        if not engine.is_file():
            remove(engine)
        raise
    return digest


def remove(engine: Path) -> None:
    """Remove an engine and its description, where they can be."""
    for path in (engine, description_of(engine)):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def read(engine: Path) -> Built:
    """What lies beside an engine says of it.

    Raises:
        EngineError: there is no description, or it was changed.
    """
    return _parsed(engine)[1]


def usual_inputs(built: Built) -> tuple[InputSpec, ...]:
    """The inputs of an engine as `--input` would say them, with the sizes it is fastest at."""
    usual = {each.name: each.usual for each in built.shapes}
    return tuple(
        InputSpec(each.name, usual.get(each.name, each.shape), each.dtype) for each in built.inputs
    )


def named(program: Artifact, built: Built) -> Artifact:
    """An engine file with the names of its inputs and outputs in the program's order, where it
    doesn't say them itself."""
    return replace(
        program,
        input_names=program.input_names or tuple(each.name for each in built.inputs),
        output_names=program.output_names or built.outputs,
    )


def load(engine: Path, here: Here, options: BuildOptions) -> tuple[bytes, Built]:
    """The bytes of an engine that may be handed to its package here, and what it is.

    Args:
        engine: the file.
        here: what would run it.
        options: what it should have been built with: the shapes where they are given, and the
            compatibility where it is asked for.

    Raises:
        EngineError: the description is missing, was changed, or does not fit the file, this
            machine or the options.
    """
    digest, built = _parsed(engine)
    try:
        content = engine.read_bytes()
    except OSError as error:
        raise _refused(engine, f"It cannot be read: {error.strerror}", _BUILD_AGAIN) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise _refused(
            engine,
            f"Its sha256 is not the one that {description_of(engine).name} beside it says: it was "
            "cut short, replaced or changed",
            f"Copy both files anew, or build the engine again: {_BUILD_AGAIN}",
        )
    reason = (
        _other_package(built, here) or _other_gpu(built, here) or _other_options(built, options)
    )
    if reason:
        raise _refused(engine, reason, f"{_BUILD_AGAIN}, here and with these options")
    return content, built


def _other_package(built: Built, here: Here) -> str | None:
    if built.package != here.package:
        return f"It was built by {built.package}, and was to be run by {here.package}"
    if built.version == here.version:
        return None
    if not built.version_compatible:
        return f"It was built by {built.package} {built.version}, and this is {here.version}"
    old, new = _numbers(built.version), _numbers(here.version)
    # An engine of 10 also runs with 11, and no other across major versions (NVIDIA's support
    # matrix of TensorRT 11.4).
    if old <= new and (old[:1] == new[:1] or (old[:1], new[:1]) == ((10,), (11,))):
        return None
    return (
        f"It was built by {built.package} {built.version} for later versions, and {here.version} "
        "is none that can load it"
    )


def _other_gpu(built: Built, here: Here) -> str | None:
    if built.hardware_compatible:
        if capability(here.target) >= capability(built.oldest_target):
            return None
        return (
            f"It was built for {built.oldest_target} and later, and the GPU here is {here.target}"
        )
    if built.target != here.target:
        return f"It was built for {built.target}, and the GPU here is {here.target}"
    if built.device not in (None, here.device):
        return f"It was built on a {built.device}, and the GPU here is a {here.device}"
    return None


def _other_options(built: Built, options: BuildOptions) -> str | None:
    if options.shapes and _ordered(options.shapes) != _ordered(built.shapes):
        return "It was built for other shapes of its inputs"
    for asked, has, what in (
        (options.version_compatible, built.version_compatible, "later versions"),
        (options.hardware_compatible, built.hardware_compatible, "later GPUs"),
    ):
        if asked and not has:
            return f"It was not built for {what}"
    return None


def _ordered(shapes: Sequence[InputShapes]) -> list[InputShapes]:
    return sorted(shapes, key=lambda each: each.name)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _parsed(engine: Path) -> tuple[str, Built]:
    """The engine's sha256 and what it is, as its description says."""
    path = description_of(engine)
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise _changed(engine)
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _refused(
            engine,
            f"There is no {path.name} beside it, which says what it was built for",
            "Copy that file too, or build the engine again: engines run native code, and unknown "
            "ones are not opened",
        ) from error
    except OSError as error:
        cause = f"{path.name} beside it cannot be read: {error.strerror}"
        raise _refused(engine, cause, _BUILD_AGAIN) from error
    except (ValueError, RecursionError) as error:  # no UTF-8 text, no JSON
        raise _changed(engine) from error
    if not isinstance(said, dict) or said.pop("sha256", None) != _digest(said):
        raise _changed(engine)
    if said.pop("format", None) != FORMAT:
        raise _refused(
            engine,
            f"{path.name} was written by another version of optfuse",
            f"{_BUILD_AGAIN} of this version",
        )
    try:
        digest = str(said.pop("engine_sha256"))
        built = Built(**{**said, **_tuples(said)})
        capability(built.target), capability(built.oldest_target), _numbers(built.version)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _changed(engine) from error
    return digest, built


def _tuples(said: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists, as what they are made of."""
    return {
        "shapes": tuple(
            InputShapes(
                str(each["name"]), *(tuple(each[key]) for key in ("least", "usual", "most"))
            )
            for each in said["shapes"]
        ),
        "inputs": tuple(
            EngineInput(str(each["name"]), str(each["dtype"]), tuple(each["shape"]))
            for each in said["inputs"]
        ),
        "outputs": tuple(said["outputs"]),
    }


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _changed(engine: Path) -> EngineError:
    name = description_of(engine).name
    return _refused(engine, f"{name} beside it was changed after it was written", _BUILD_AGAIN)


def _refused(engine: Path, cause: str, next_step: str) -> EngineError:
    return EngineError(f"The engine {engine.name} is not opened", cause, next_step)
