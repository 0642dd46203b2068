"""Any part of an ONNX file as a file of its own, run by an engine: from values that are fed in to
values that are asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import onnx
import torch

from optfuse import backends
from optfuse.backends.onnx_runtime import ELEMENT_TYPES
from optfuse.errors import LoadError
from optfuse.files import sha256
from optfuse.stages import Artifact, BuildOptions

if TYPE_CHECKING:
    from typing_extensions import Self

COMPUTED = "/computed"
"""What is added to the name of a value that is both fed in and asked for, where it is computed."""

_ELEMENT_NUMBERS = dict(ELEMENT_TYPES.values())
_DTYPES = {number: getattr(torch, name) for name, number in ELEMENT_TYPES.values()}


class OnnxParts:
    """An ONNX file that can be run in parts. A context manager: the parts lie in a folder that goes
    away at its end.

    Args:
        path: of the file.
        engine: the backend that runs its parts.
        threads: of the engine.

    Attributes:
        model: the file without weights that lie in other files.
        inputs: names, in order.

    Raises:
        LoadError: it is no ONNX file.
    """

    def __init__(self, path: Path, engine: str, threads: int) -> None:
        self.path = path
        self.engine = engine
        self.model = _read(path)
        graph = self.model.graph
        self._constants = {each.name: each for each in graph.initializer}
        self._sparse = {each.values.name: each for each in graph.sparse_initializer}
        known = self._constants.keys() | self._sparse.keys()
        self.inputs = tuple(each.name for each in graph.input if each.name not in known)
        self._made_by = {
            name: index for index, node in enumerate(graph.node) for name in node.output
        }
        self._types = _types(self.model)
        self._options = BuildOptions(threads=threads)
        self._folder: Path | None = None

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Compute some values from others.

        Args:
            outputs: names of values that nodes make.
            feeds: inputs of the file and values in between; a node that makes one of these is run
                only where its result is asked for.

        Raises:
            EngineError: the engine cannot run that part.
        """
        part = self.part(outputs, feeds)
        path = self._written(part)
        artifact = Artifact(path, "onnx", sha256(path), path.stat().st_size)
        with backends.get(self.engine).open(artifact, self._options) as session:
            session.bind([feeds[name] for name in session.inputs])
            session.run()
            return dict(zip(outputs, session.fetch(), strict=True))

    def part(self, outputs: Sequence[str], feeds: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
        """The part of the model that computes `outputs` from `feeds`."""
        graph = self.model.graph
        needed, read_names = self._needed(outputs, feeds)
        part = onnx.ModelProto(ir_version=self.model.ir_version)
        part.opset_import.extend(self.model.opset_import)
        part.functions.extend(self.model.functions)
        part.graph.name = graph.name
        for index in sorted(needed):
            node = part.graph.node.add()
            node.CopyFrom(graph.node[index])
            for position, name in enumerate(node.output):
                if name in feeds:
                    node.output[position] = name + COMPUTED
        part.graph.initializer.extend(
            each for name, each in self._constants.items() if name in read_names
        )
        part.graph.sparse_initializer.extend(
            each for name, each in self._sparse.items() if name in read_names
        )
        for name, tensor in feeds.items():
            if name in read_names:
                number = _ELEMENT_NUMBERS[str(tensor.dtype).removeprefix("torch.")]
                shape = list(tensor.shape)
                part.graph.input.append(onnx.helper.make_tensor_value_info(name, number, shape))
        for name in outputs:
            # Without a type: the engine works that out.
            part.graph.output.add().name = name + COMPUTED if name in feeds else name
        return part

    def reads(self, outputs: Sequence[str], feeds: Iterable[str]) -> set[str]:
        """Which of `feeds` the part that computes `outputs` reads."""
        given = set(feeds)
        return self._needed(outputs, given)[1] & given

    def types_read(self, output: str, feeds: Mapping[str, torch.Tensor]) -> set[torch.dtype]:
        """The types of what the part which computes `output` from `feeds` reads, as far as the file
        tells them and as `growth` takes them."""
        nodes = self.model.graph.node
        found = set()
        for index in self._needed([output], feeds)[0]:
            for name in read_by(nodes[index]):
                maker = nodes[self._made_by[name]].op_type if name in self._made_by else ""
                if nodes[index].op_type == maker == "Cast":
                    continue
                if name in feeds:
                    found.add(feeds[name].dtype)
                elif self._types.get(name) in _DTYPES:
                    found.add(_DTYPES[self._types[name]])
        return found

    def _needed(self, outputs: Sequence[str], feeds: Iterable[str]) -> tuple[set[int], set[str]]:
        """The nodes that compute `outputs` from `feeds`, and all names that they read."""
        given = set(feeds)
        nodes: set[int] = set()
        names: set[str] = set()
        waiting = [self._made_by[name] for name in outputs]
        while waiting:
            index = waiting.pop()
            if index in nodes:
                continue
            nodes.add(index)
            for name in read_by(self.model.graph.node[index]):
                names.add(name)
                if name in self._made_by and name not in given:
                    waiting.append(self._made_by[name])
        return nodes, names

    def _written(self, part: onnx.ModelProto) -> Path:
        assert self._folder is not None, "enter it first"
        path = self._folder / "part.onnx"
        path.write_bytes(part.SerializeToString())
        return path

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="optfuse-"))
        try:
            self._copy_weights(self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._folder is not None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _copy_weights(self, folder: Path) -> None:
        """Put the files with the weights beside the parts. Copies, since ONNX Runtime follows no
        link out of a model's folder."""
        for location in _weights_files(self.model):
            try:
                if Path(location).is_absolute() or ".." in Path(location).parts:
                    raise OSError("it lies outside of the file's own folder")
                (folder / location).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path.parent / location, folder / location)
            except OSError as error:
                raise LoadError(
                    f"The weights of '{self.path}' in '{location}' cannot be read",
                    error.strerror or str(error),
                    "Export the model again, or put its second file beside it",
                ) from error


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The names of all values that a node reads, those that its branches take from outside too."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            own = {name for inner in graph.node for name in inner.output}
            own |= {each.name for each in (*graph.input, *graph.initializer)}
            names = [name for inner in graph.node for name in read_by(inner)]
            names += [each.name for each in graph.output]
            yield from (name for name in names if name not in own)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The number in onnx.TensorProto.DataType of every value whose type the file tells."""
    graph = model.graph
    found = {
        each.name: each.type.tensor_type.elem_type
        for each in (*graph.value_info, *graph.input, *graph.output)
    }
    found |= {each.name: each.data_type for each in graph.initializer}
    found |= {each.values.name: each.values.data_type for each in graph.sparse_initializer}
    for node in graph.node:
        for each in node.attribute:
            if node.op_type == "Cast" and each.name == "to":
                found[node.output[0]] = each.i
    return found


def _weights_files(model: onnx.ModelProto) -> list[str]:
    """Where the weights are that are not in the file itself, relative to it."""
    locations = (
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    )
    return list(dict.fromkeys(locations))


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's and the file system's own
        raise LoadError(
            f"'{path}' cannot be read",
            f"It is no ONNX file: {type(error).__name__}",
            "Export the model again",
        ) from error
