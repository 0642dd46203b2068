"""What everything is compared with, and how anything is run on the inputs of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from optfuse import backends
from optfuse.errors import ModelError, UsageError
from optfuse.feeds import require_in_range
from optfuse.float64 import run_float64
from optfuse.layers import compare_file, compare_files, compare_layers, compare_with_float64
from optfuse.layers.onnx_float64 import run_file_float64
from optfuse.layers.programs import REFERENCE
from optfuse.stages import Artifact, BuildOptions, LayerDrifts, Program
from optfuse.subjects import Subject, program_of

Inputs = Mapping[str, torch.Tensor]
"""One run's inputs by their names, in the reference's order."""


@dataclass(frozen=True)
class Opened:
    """A subject, and what its engine opens."""

    subject: Subject
    thing: Program | Artifact

    @property
    def name(self) -> str:
        """What it is called in the report."""
        return self.subject.name


class Reference(Protocol):
    """What everything is compared with."""

    name: str

    def outputs(self, runs: Sequence[Inputs]) -> list[Outputs]:
        """What it gives, run by run."""

    def layers(self, other: Opened, inputs: Inputs) -> LayerDrifts:
        """The drift of another one's layers."""


@dataclass(frozen=True)
class Outputs:
    """The outputs of one run, their names (empty where they have none), and what ran it."""

    tensors: list[torch.Tensor]
    names: tuple[str, ...] = ()
    device: str = ""


def choose_reference(first: Opened, *, alone: bool, threads: int) -> Reference:
    """What the first subject makes the reference.

    Args:
        first: a model source stands for its program in float64.
        alone: there is no other: then an ONNX file stands for itself in float64, not as it runs.
        threads: of engines.
    """
    if first.subject.kind == "source":
        exported = not isinstance(first.thing, Program)
        program = program_of(first.subject) if exported else first.thing
        assert isinstance(program, Program)
        return ProgramInFloat64(program, threads)
    return FileInFloat64(first, threads) if alone else AsItRuns(first, threads)


def outputs_of(opened: Opened, runs: Sequence[Inputs], threads: int) -> list[Outputs]:
    """What its engine gives, run by run."""
    backend = backends.get(opened.subject.engine)
    with backend.open(opened.thing, BuildOptions(threads=threads)) as session:
        fitted = [_fitted(session.inputs, inputs, opened.name) for inputs in runs]
        if isinstance(opened.thing, Artifact):
            require_in_range(opened.thing, fitted)
        found = []
        for feeds in fitted:
            session.bind(feeds)
            session.run()
            tensors, names = session.fetch(), tuple(session.outputs)
            if len(names) != len(tensors):
                names = tuple(f"output_{index}" for index in range(len(tensors)))
            found.append(Outputs(tensors, names, session.device))
        return found


def _fitted(names: Sequence[str], inputs: Inputs, whose: str) -> list[torch.Tensor]:
    """The inputs in the order of another one's names; in their own where its names are others."""
    if set(names) == set(inputs):
        return [inputs[name] for name in names]
    if len(names) != len(inputs):
        raise _not_alike(whose, f"It takes {len(names)} inputs and the first {len(inputs)}")
    return list(inputs.values())


def aligned(ours: Outputs, theirs: Outputs, whose: str) -> Outputs:
    """The outputs in the reference's order, where the same names stand in another one."""
    if set(ours.names) == set(theirs.names):
        by_name = dict(zip(ours.names, ours.tensors, strict=True))
        ours = replace(ours, tensors=[by_name[name] for name in theirs.names], names=theirs.names)
    if len(ours.tensors) != len(theirs.tensors):
        raise _not_alike(
            whose, f"It gives {len(ours.tensors)} outputs and the reference {len(theirs.tensors)}"
        )
    if not ours.tensors:
        raise _not_alike(whose, "It gives no tensor")
    for name, one, other in zip(ours.names, ours.tensors, theirs.tensors, strict=True):
        if one.shape != other.shape:
            shapes = [f"{'x'.join(map(str, each.shape)) or 'scalar'}" for each in (one, other)]
            raise _not_alike(
                whose,
                f"Its output '{name}' has the shape {shapes[0]} and the reference's {shapes[1]}",
            )
    return ours


def _not_alike(whose: str, cause: str) -> UsageError:
    return UsageError(
        f"'{whose}' cannot be compared with the reference",
        cause,
        "Give things that take the same inputs and compute the same outputs",
    )


class ProgramInFloat64:
    """A captured program in float64."""

    name = REFERENCE

    def __init__(self, program: Program, threads: int) -> None:
        self.program = program
        self._threads = threads

    def outputs(self, runs: Sequence[Inputs]) -> list[Outputs]:
        """Computed once for each run.

        Raises:
            ModelError: it does not run in float64.
        """
        try:
            found = [
                run_float64(self.program.graph_module, *self._arguments(inputs)) for inputs in runs
            ]
        except Exception as error:  # an operator may raise anything
            raise ModelError(
                f"'{self.program.name}' cannot be run in float64",
                f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
                "Compare it with its ONNX file as that runs: give the file first",
            ) from error
        return [
            Outputs([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]) for leaves in found
        ]

    def layers(self, other: Opened, inputs: Inputs) -> LayerDrifts:
        """Of a program in step with this one, of an ONNX file by exposing what is inside.

        Raises:
            UsageError: nothing inside the other one can be looked at.
            OptfuseError: it cannot be run layer by layer.
        """
        args, kwargs = self._arguments(inputs)
        thing = other.thing
        if isinstance(thing, Program):
            return compare_layers(self.program, thing, args, kwargs)
        _require_exposing(other)
        return compare_file(
            self.program,
            thing.path,
            args,
            kwargs,
            _fitted(thing.input_names, inputs, other.name),
            engine=other.subject.engine,
            threads=self._threads,
        )

    def _arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example arguments with these tensors in the place of their own."""
        given = iter(inputs.values())
        examples = (tuple(self.program.example_args), dict(self.program.example_kwargs))
        args, kwargs = pytree.tree_map(
            lambda leaf: next(given) if isinstance(leaf, torch.Tensor) else leaf, examples
        )
        return args, kwargs


class FileInFloat64:
    """An ONNX file in float64."""

    def __init__(self, file: Opened, threads: int) -> None:
        assert isinstance(file.thing, Artifact)
        self._file = file.thing
        self._threads = threads
        self.name = f"{file.thing.path.name} in float64"

    def outputs(self, runs: Sequence[Inputs]) -> list[Outputs]:
        """Computed by ONNX's reference implementation, which takes its time.

        Raises:
            ModelError: an operator has none in float64.
        """
        return [
            Outputs(
                run_file_float64(self._file.path, list(inputs.values())), self._file.output_names
            )
            for inputs in runs
        ]

    def layers(self, other: Opened, inputs: Inputs) -> LayerDrifts:
        """Of the file itself, as its engine runs it.

        Raises:
            UsageError: nothing inside can be looked at.
            OptfuseError: it cannot be run layer by layer.
        """
        _require_exposing(other)
        return compare_with_float64(
            self._file.path,
            list(inputs.values()),
            engine=other.subject.engine,
            threads=self._threads,
        )


class AsItRuns:
    """The first subject as its engine runs it."""

    def __init__(self, first: Opened, threads: int) -> None:
        self._first = first
        self._threads = threads
        self.name = f"{first.name} as it runs"

    def outputs(self, runs: Sequence[Inputs]) -> list[Outputs]:
        """What its engine gives."""
        return outputs_of(self._first, runs, self._threads)

    def layers(self, other: Opened, inputs: Inputs) -> LayerDrifts:
        """Of values with the same names in two ONNX files.

        Raises:
            UsageError: one of them is no ONNX file, or nothing inside can be looked at.
            OptfuseError: one cannot be run layer by layer.
        """
        first, thing = self._first.thing, other.thing
        for each in (self._first, other):
            _require_exposing(each)
        assert isinstance(first, Artifact)
        assert isinstance(thing, Artifact)
        return compare_files(
            first.path,
            thing.path,
            list(inputs.values()),
            engine=other.subject.engine,
            reference_engine=self._first.subject.engine,
            threads=self._threads,
        )


def _require_exposing(opened: Opened) -> None:
    backend = backends.get(opened.subject.engine)
    if isinstance(opened.thing, Program) or opened.thing.kind != "onnx" or backend.builds:
        raise UsageError(
            f"The layers of '{opened.name}' cannot be compared",
            "Nothing between its inputs and its outputs can be looked at"
            if isinstance(opened.thing, Artifact)
            else "The first one is a file, and layers of a model source have other names",
            "Give the model source first, and the ONNX file on ONNX Runtime second",
        )
