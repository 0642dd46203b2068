"""Subjects -> a report of how far apart their outputs are, and which layer is the first to blame;
read it from top to bottom."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from optfuse import backends
from optfuse.compare import drift, output_drifts
from optfuse.diff.references import (
    AsItRuns,
    Inputs,
    Opened,
    Outputs,
    ProgramInFloat64,
    Reference,
    aligned,
    choose_reference,
    outputs_of,
)
from optfuse.environment import environment
from optfuse.errors import OptfuseError, UsageError
from optfuse.feeds import feeds_of, onnx_inputs, require_in_range
from optfuse.float64 import random_inputs, torch_threads
from optfuse.graph import flat_inputs, placeholders
from optfuse.optimize import optimize, select
from optfuse.report.diff import Compared, assemble
from optfuse.samples import Wanted, read_samples
from optfuse.stages import (
    Artifact,
    Drift,
    InputSpec,
    LayerDrifts,
    Notify,
    Program,
    Report,
    silent,
)
from optfuse.subjects import Subject, opened_by, parse_subjects, require_runnable


@dataclass(frozen=True)
class DiffRequest:
    """What a user asked for.

    Attributes:
        subjects: SUBJECT[@ENGINE] arguments; the first decides what the others are compared with.
        passes: the first one, a model source, is also compared with what these passes make of it,
            on PyTorch; None for not.
        weights, inputs, seed, trust: of every model source among them, as in `Source`.
        data: a file with inputs, or None.
        samples: how many random inputs; None for one run, on the examples.
        per_layer: also look at every layer.
        threads: of every engine that runs on the CPU, and of the reference.
        command: the command line that gives this report again.
    """

    subjects: tuple[str, ...]
    passes: str | None = None
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    seed: int = 0
    trust: bool = False
    data: Path | None = None
    samples: int | None = None
    per_layer: bool = False
    threads: int = 1
    command: tuple[str, ...] = ()


def diff(request: DiffRequest, notify: Notify = silent) -> Report:
    """Compare subjects with a reference, on one input or on several.

    The reference is a model source in float64, where the first subject is one; its own float32
    error is then reported too, and that of the others as a multiple of it. A single ONNX file is
    compared with itself in float64. Otherwise the first subject as it runs is the reference.

    Args:
        request: what is compared, and how.
        notify: told what is going on.

    Raises:
        UsageError: a subject cannot be read, or they do not take the same inputs and give the same
            outputs.
        OptfuseError: one cannot be loaded or run.
    """
    subjects = parse_subjects(
        request.subjects,
        weights=request.weights,
        inputs=request.inputs,
        seed=request.seed,
        trust=request.trust,
    )
    _check(request, subjects)
    machine = environment(request.threads)  # now, so that its load is not our own
    with (
        torch_threads(request.threads),
        tempfile.TemporaryDirectory(prefix="optfuse-") as folder,
    ):
        opening = _Opening(subjects, Path(folder), notify)
        first = opening.open(0)
        reference = choose_reference(first, alone=len(subjects) == 1, threads=request.threads)
        runs = _runs(first.thing, request)
        notify(f"Running the {reference.name}", None)
        comparing = _Comparing(request, reference, runs, reference.outputs(runs), notify)
        alone = len(subjects) == 1 and request.passes is None
        compared = []
        for opened in _contenders(first, opening, reference, request):
            # Beside others, the reference's own program in step with itself has nothing to tell.
            itself = opened is first and isinstance(first.thing, Program)
            per_layer = request.per_layer and (alone or not itself)
            compared.append(comparing.compare(opened, per_layer=per_layer))
    return assemble(
        reference=reference.name,
        compared=compared,
        with_own=isinstance(reference, ProgramInFloat64),
        inputs=_described(runs[0]),
        command=request.command,
        environment=machine,
        settings=_settings(request, len(runs)),
    )


def _check(request: DiffRequest, subjects: Sequence[Subject]) -> None:
    """What cannot be combined, and engines that cannot run here, before any work is done."""
    first = subjects[0]
    if request.data is not None and request.samples is not None:
        raise UsageError(
            "--data and --samples cannot be combined",
            "The file says which inputs are used, and how many",
            "Leave one of them out",
        )
    if request.passes is not None:
        select(request.passes)
        if first.kind != "source":
            raise UsageError(
                f"--passes cannot be used with '{first.text}'",
                "Passes run on a model source, and it is a file",
                "Give the model source first, or leave --passes out",
            )
    for subject in subjects:
        require_runnable(subject)
    if len(subjects) == 1 and first.kind == "engine":
        raise UsageError(
            f"'{first.text}' cannot be compared with itself in float64",
            "Nobody but the engine that built it can run an engine file",
            "Give the model source or the ONNX file it was built from first, and it second",
        )


@dataclass(frozen=True)
class _Opening:
    """Subjects, opened one by one when they are needed, so that not all are held at once."""

    subjects: Sequence[Subject]
    folder: Path
    notify: Notify

    def open(self, index: int) -> Opened:
        subject = self.subjects[index]
        self.notify(f"Opening {subject.name}", None)
        folder = self.folder / str(index)
        folder.mkdir()
        return Opened(subject, opened_by(subject, folder))


def _contenders(
    first: Opened, opening: _Opening, reference: Reference, request: DiffRequest
) -> Iterator[Opened]:
    """What is compared with the reference, one after the other."""
    if not isinstance(reference, AsItRuns):
        yield first
    if request.passes is not None:
        assert isinstance(reference, ProgramInFloat64)
        passes = select(request.passes)
        program = optimize(reference.program, passes, seed=request.seed, notify=opening.notify)
        short, _, _ = first.name.rpartition("@")
        subject = replace(first.subject, name=f"{short} optimized@torch", engine="torch")
        yield Opened(subject, program)
    for index in range(1, len(opening.subjects)):
        yield opening.open(index)


def _runs(first: Program | Artifact, request: DiffRequest) -> list[Inputs]:
    """The inputs of every run: the user's own, random ones, or the examples."""
    wanted = _wanted(first, request)
    names = [each.name for each in wanted]
    if request.data is not None:
        given = read_samples(request.data, wanted)
    else:
        examples = feeds_of(first, request.inputs, request.seed)
        given = [examples]
        if request.samples is not None:
            seeds = range(request.seed, request.seed + request.samples)
            given = [list(random_inputs(tuple(examples), {}, seed)[0]) for seed in seeds]
    if isinstance(first, Artifact):
        require_in_range(first, given)
    return [dict(zip(names, tensors, strict=True)) for tensors in given]


def _wanted(first: Program | Artifact, request: DiffRequest) -> list[Wanted]:
    """The inputs that one run takes, in order; with a file's open sizes as --input has them, or
    left open."""
    if isinstance(first, Artifact) and first.kind == "onnx":
        own = onnx_inputs(first.path)
        if not request.inputs:
            return [Wanted(name, dtype, shape) for name, dtype, shape in own]
        fed = feeds_of(first, request.inputs, request.seed)
        return [
            Wanted(name, dtype, tuple(each.shape))
            for (name, dtype, _), each in zip(own, fed, strict=True)
        ]
    examples = feeds_of(first, request.inputs, request.seed)
    if isinstance(first, Program):
        leaves = flat_inputs(first.graph_module, first.example_args, first.example_kwargs)
        nodes = placeholders(first.graph_module.graph)
        both = zip(nodes, leaves, strict=True)
        names = [str(node.target) for node, leaf in both if isinstance(leaf, torch.Tensor)]
    else:
        names = list(first.input_names)
    return [
        Wanted(name, _dtype(example), tuple(example.shape))
        for name, example in zip(names, examples, strict=True)
    ]


@dataclass(frozen=True)
class _Comparing:
    """The reference's outputs, which one contender after the other is compared with."""

    request: DiffRequest
    reference: Reference
    runs: Sequence[Inputs]
    expected: Sequence[Outputs]
    notify: Notify

    def compare(self, opened: Opened, *, per_layer: bool) -> Compared:
        """A contender's distance in every run; of the worst one, its outputs and its layers."""
        self.notify(f"Comparing {opened.name}", None)
        ran = outputs_of(opened, self.runs, self.request.threads)
        pairs = [
            (aligned(ours, theirs, opened.name), theirs)
            for ours, theirs in zip(ran, self.expected, strict=True)
        ]
        drifts = [self._drift(opened, ours, theirs) for ours, theirs in pairs]
        worst = max(range(len(drifts)), key=lambda index: drifts[index].relative_l2)
        ours, theirs = pairs[worst]
        outputs = output_drifts(ours.tensors, theirs.tensors, ours.names)
        layers, reason = self._layers(opened, self.runs[worst]) if per_layer else (None, None)
        subject = opened.subject
        return Compared(
            name=opened.name,
            text=subject.text,
            kind=subject.kind,
            engine=subject.engine,
            device=ours.device,
            version=backends.get(subject.engine).version(),
            sha256=opened.thing.sha256 if isinstance(opened.thing, Artifact) else None,
            samples=drifts,
            worst=worst,
            outputs=[asdict(each) for each in outputs],
            layers=layers,
            no_layers=reason,
        )

    def _drift(self, opened: Opened, ours: Outputs, theirs: Outputs) -> Drift:
        return drift(
            ours.tensors,
            theirs.tensors,
            engine=opened.subject.engine,
            variant=opened.name,
            reference_name=self.reference.name,
        )

    def _layers(self, opened: Opened, inputs: Inputs) -> tuple[LayerDrifts | None, str | None]:
        """The drift of the layers, or why there is none: the outputs are compared all the same."""
        self.notify(f"Comparing {opened.name} layer by layer", None)
        try:
            return self.reference.layers(opened, inputs), None
        except OptfuseError as error:
            return None, error.cause


def _described(inputs: Inputs) -> list[InputSpec]:
    return [InputSpec(name, tuple(each.shape), _dtype(each)) for name, each in inputs.items()]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _settings(request: DiffRequest, runs: int) -> Mapping[str, Any]:
    drawn = "random" if request.samples is not None else "examples"
    return {
        "threads": request.threads,
        "seed": request.seed,
        "inputs": "file" if request.data is not None else drawn,
        "data": None if request.data is None else str(request.data),
        "samples": runs,
        "per_layer": request.per_layer,
        "passes": None if request.passes is None else [str(p) for p in select(request.passes)],
    }
