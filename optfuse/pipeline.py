"""The whole program, from a model's source to its report; read it from top to bottom."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from optfuse import cost, memory
from optfuse.ablate import ablate
from optfuse.backends import Backend
from optfuse.capture import capture
from optfuse.environment import environment
from optfuse.errors import (
    FunctionChangedError,
    ModelError,
    OptfuseError,
    UsageError,
)
from optfuse.explain import fitting, histories, norms_left, places_elsewhere
from optfuse.export import data_file, export, export_baseline
from optfuse.files import cache_folder, sha256, staged, write_text
from optfuse.float64 import run_float64, torch_threads
from optfuse.graph import flat_inputs, operators, placeholders
from optfuse.layers import compare_layers
from optfuse.load import load
from optfuse.optimize import optimize, select
from optfuse.passes import Pass
from optfuse.report import markdown, schema
from optfuse.stages import (
    Artifact,
    BuildOptions,
    Dimension,
    InputShapes,
    InputSpec,
    LayerDrifts,
    LayerHistory,
    LoadedModel,
    Notify,
    Program,
    Report,
    Source,
    silent,
)
from optfuse.trial import (
    REFERENCE,
    Findings,
    Inputs,
    Trial,
    can_run,
    choose,
    is_large,
    put_through,
)


@dataclass(frozen=True)
class Request:
    """What a user asked for.

    Attributes:
        source: the model.
        passes: which passes run, as `--passes` has it.
        engines: which engines build and run it; empty for all that are here.
        targets: compute capabilities to build engines for, e.g. `("sm_89",)`.
        output: the folder that receives everything; None for `out/` and the model's name.
        threads: of every engine that runs on the CPU, and of the proofs.
        duration_seconds: how long latency is measured in all; 0 measures none.
        output_names: what the outputs are called in both ONNX files; empty for torch.onnx's names.
        ablate: measure each pass alone, each one left out, and all up to each one.
        strict: a pass that changed the function fails the run, after it was undone.
        command: the command line that gives this run again.
    """

    source: Source
    output: Path | None = None
    passes: str = "all"
    engines: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    threads: int = 1
    duration_seconds: float = 15.0
    output_names: tuple[str, ...] = ()
    ablate: bool = False
    strict: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The report of a run, and what failed on the way without ending it."""

    report: Report
    failures: tuple[OptfuseError, ...]


def run(request: Request, notify: Notify = silent) -> Outcome:
    """Take a model from its source to its report.

    Writes `baseline.onnx`, `model.onnx`, `engines/`, `report.json` and `report.md` into the output
    folder, each whole or not at all.

    Raises:
        OptfuseError: nothing can be reported. An engine that fails only ends its own part: it is
            in `Outcome.failures`, and the report says what was not measured and why.
    """
    engines = choose(request.engines, request.targets)
    _require_something_to_ablate(request)
    machine = environment(request.threads)  # now, so that its load is not our own
    with torch_threads(request.threads):
        return _run(request, machine, engines, notify)


def _run(
    request: Request,
    machine: Mapping[str, Any],
    engines: Sequence[Backend],
    notify: Notify,
) -> Outcome:
    selected = select(request.passes)
    notify(f"Loading {request.source.text}", None)
    model = load(request.source)
    output = request.output or Path("out") / model.name
    with staged(output):
        pass  # the folder can be written to: said now rather than after minutes of work
    parameter_bytes = _parameter_bytes(model)
    found = Findings(output)

    with memory.freed_at_once(is_large(parameter_bytes)):
        notify(f"Capturing {model.name} with torch.export", None)
        captured = capture(model)
        faster = optimize(captured, selected, seed=request.source.seed, notify=notify)
        inputs = _inputs(captured, engines, found, notify)
        if not is_large(parameter_bytes):  # it takes five runs in step
            found.layers = _layers(captured, faster, request.source.seed, notify)
        notify("Exporting ONNX as it comes", None)
        baseline = export_baseline(
            captured, output / "baseline.onnx", output_names=request.output_names
        )
        notify("Exporting optimized ONNX", None)
        optimized = export(
            faster,
            output / "model.onnx",
            input_names=baseline.input_names,
            output_names=baseline.output_names,
        )

    found.artifacts += [baseline, optimized, *_weights(baseline, optimized)]
    described = _describe(selected, captured, faster)
    undone = _changed_functions(request, faster)
    trial = Trial(
        parameter_bytes,
        programs={"baseline": captured, "optimized": faster},
        onnx={"baseline": baseline, "optimized": optimized},
        inputs=inputs,
        usual=next(each for each in inputs if each.at == _usual(captured)),
        options=BuildOptions(
            targets=request.targets,
            threads=request.threads,
            cache=cache_folder(),
            shapes=_profile(baseline, inputs, _usual(captured)),
        ),
        duration_seconds=request.duration_seconds,
        seed=request.source.seed,
    )
    # The trial alone holds the programs now, and lets go of them in time. (A pass still holds
    # nodes of the last graph that it went through.)
    del model, captured, faster, selected
    interleaved = put_through(engines, trial, found, notify)
    if request.ablate:
        _ablate(engines, trial, request, found, notify)

    report = _report(request, machine, interleaved, described, optimized, found)
    write_text(output / "report.json", schema.dump(report))
    write_text(output / "report.md", markdown.render(report))
    return Outcome(report, (*undone, *found.failures))


@dataclass(frozen=True)
class Explanation:
    """What the passes did and left, and why.

    Attributes:
        program: after them, with the trace of each pass.
        histories: the same layer by layer.
        norms: the batch norms that stay because they stand behind no convolution, where all layers
            were asked for.
        elsewhere: how many refused places have to do with none of the layers, likewise.
    """

    program: Program
    histories: tuple[LayerHistory, ...]
    norms: tuple[str, ...] = ()
    elsewhere: int = 0

    def document(self, *, by_pass: bool) -> Report:
        """What each pass did, or what became of each layer, as JSON has it."""
        if by_pass:
            steps = [schema.step_document(step) for step in self.program.trace]
            return Report({"model": self.program.name, "steps": steps})
        told = [schema.history_document(history) for history in self.histories]
        left = {"norms": self.norms, "elsewhere": self.elsewhere}
        return Report({"model": self.program.name, "convolutions": told, **left})


def explain(
    source: Source, passes: str, module: str | None = None, notify: Notify = silent
) -> Explanation:
    """Run the passes alone, and say what they did.

    Args:
        source: the model.
        passes: as `--passes` has it.
        module: a pattern that the paths of the layers' modules have to fit, or None for all.
        notify: told what is going on.

    Raises:
        OptfuseError: the model cannot be loaded or captured, a pass does not exist, or no layer
            fits the pattern.
    """
    selected = select(passes)
    notify(f"Loading {source.text}", None)
    model = load(source)
    notify(f"Capturing {model.name} with torch.export", None)
    captured = capture(model)
    faster = optimize(captured, selected, seed=source.seed, notify=notify)
    told = histories(captured, faster)
    if module is not None:
        return Explanation(faster, fitting(told, module))
    return Explanation(faster, told, norms_left(faster), places_elsewhere(faster.trace, told))


@dataclass(frozen=True)
class _Described:
    """What the report says of the programs and the passes, taken while they are there."""

    passes: list[str]
    name: str
    inputs: list[InputSpec]
    dimensions: tuple[Dimension, ...]
    before: schema.ProgramCounts
    after: schema.ProgramCounts
    histories: tuple[LayerHistory, ...]


def _weights(*exported: Artifact) -> list[Artifact]:
    """The second files of ONNX files that have one."""
    found = []
    for artifact in exported:
        path = data_file(artifact.path)
        if path.is_file():
            size_bytes = path.stat().st_size
            found.append(Artifact(path, "weights", sha256(path), size_bytes, artifact.variant))
    return found


def _inputs(
    captured: Program, engines: Sequence[Backend], found: Findings, notify: Notify
) -> list[Inputs]:
    """What every engine is run on, with the captured program's outputs in float64; None where
    nothing is compared with them, or where it does not run in float64."""
    inputs = []
    for at, args, kwargs in _points(captured):
        feeds = _tensors(flat_inputs(captured.graph_module, args, kwargs))
        reference = None
        if can_run(engines):
            notify(f"Running the float64 reference{f' at {at}' if at else ''}", None)
            try:
                reference = _tensors(run_float64(captured.graph_module, args, kwargs))
            except Exception as error:
                found.failures.append(
                    ModelError(
                        f"The drift of '{captured.name}' cannot be taken",
                        f"It does not run in float64{f' at {at}' if at else ''}: "
                        f"{type(error).__name__}",
                        "Use the report's latency alone, or leave out of the model what needs "
                        "float32",
                    )
                )
        inputs.append(Inputs(at, feeds, reference))
    return inputs


def _points(program: Program) -> list[tuple[str | None, tuple[Any, ...], Mapping[str, Any]]]:
    """Where drift and latency are taken: the examples or, with open dimensions, each point."""
    if program.sizes is None:
        return [(None, program.example_args, program.example_kwargs)]
    return [(point.at, point.args, point.kwargs) for point in program.sizes.points]


def _usual(program: Program) -> str | None:
    return None if program.sizes is None else program.sizes.usual.at


def _profile(
    baseline: Artifact, inputs: Sequence[Inputs], usual: str | None
) -> tuple[InputShapes, ...]:
    """The shapes of each input that has open dimensions."""
    if usual is None:
        return ()
    [middle] = [each for each in inputs if each.at == usual]
    shapes = [
        [tuple(feed.shape) for feed in each.feeds] for each in (inputs[0], middle, inputs[-1])
    ]
    return tuple(
        InputShapes(name, least, usual_, most)
        for name, least, usual_, most in zip(baseline.input_names, *shapes, strict=True)
        if least != most
    )


def _layers(captured: Program, faster: Program, seed: int, notify: Notify) -> LayerDrifts | None:
    """The drift of every layer on PyTorch; None where a layer does not run by itself or in float64,
    which costs no more than this one table."""
    at, args, kwargs = _points(captured)[0]  # the cheapest, and layers are the same at all
    notify("Comparing layer by layer", None)
    try:
        return replace(compare_layers(captured, faster, args, dict(kwargs), seed=seed), at=at)
    except ModelError:
        return None


def _require_something_to_ablate(request: Request) -> None:
    if not request.ablate:
        return
    if request.duration_seconds <= 0 or not select(request.passes):
        raise UsageError(
            "What each pass earned cannot be measured",
            "There is no time to measure in (--duration 0)"
            if request.duration_seconds <= 0
            else "No pass is selected",
            "Leave --ablate out, or give it time and passes",
        )


def _ablate(
    engines: Sequence[Backend], trial: Trial, request: Request, found: Findings, notify: Notify
) -> None:
    """What each pass earned on each engine; a failure here costs nothing but these rows."""
    if trial.is_large:
        reason = "each choice of passes is a model of its own, and this one is too large for that"
        found.not_measured += [
            schema.NotMeasured(f"{engine.name} --ablate", None, None, reason) for engine in engines
        ]
        return
    with tempfile.TemporaryDirectory(prefix="optfuse-") as folder:
        try:
            ablation = ablate(
                trial.programs["baseline"],
                select(request.passes),
                engines,
                baseline=trial.onnx["baseline"],
                feeds=trial.usual.feeds,
                reference=trial.usual.reference,
                reference_name=REFERENCE,
                options=trial.options,
                folder=Path(folder),
                # Each gets as much time as each variant had in the run before.
                seconds_each=request.duration_seconds / (3 * max(1, len(engines))),
                seed=request.source.seed,
                notify=notify,
            )
        except OptfuseError as error:
            found.failures.append(error)
            return
    found.ablation = tuple(
        replace(row, measurement=replace(row.measurement, at=trial.usual.at))
        for row in ablation.rows
    )
    found.failures += ablation.failures


def _report(
    request: Request,
    machine: Mapping[str, Any],
    interleaved: Sequence[Sequence[str]],
    described: _Described,
    optimized: Artifact,
    found: Findings,
) -> Report:
    return schema.assemble(
        name=described.name,
        source=request.source,
        command=request.command,
        environment=machine,
        settings={
            "passes": described.passes,
            "engines": [name for turn in interleaved for name in turn],
            "interleaved": interleaved,
            "targets": list(request.targets),
            "seed": request.source.seed,
            "threads": request.threads,
            "duration_seconds": request.duration_seconds,
        },
        inputs=described.inputs,
        dimensions=described.dimensions,
        before=described.before,
        after=described.after,
        steps=optimized.trace,
        drifts=found.drifts,
        measurements=found.measurements,
        comparisons=found.comparisons,
        noise_floors=found.noise_floors,
        engine_reports=found.engine_reports,
        artifacts=found.artifacts,
        not_measured=found.not_measured,
        warnings=found.warnings,
        layers=found.layers,
        ablation=found.ablation,
        histories=described.histories,
        directory=found.output,
    )


def _changed_functions(request: Request, faster: Program) -> list[OptfuseError]:
    """With --strict: one error for each pass that was undone."""
    if not request.strict:
        return []
    return [
        FunctionChangedError(
            f"The pass {step.name} changed what '{faster.name}' computes, and was undone",
            step.undone,
            f"Leave it out with --passes all,-{step.name}, and please report the model",
        )
        for step in faster.trace
        if step.undone
    ]


def _describe(selected: Sequence[Pass], captured: Program, faster: Program) -> _Described:
    return _Described(
        passes=[str(each) for each in selected],
        name=captured.name,
        inputs=_described_inputs(captured),
        dimensions=captured.sizes.dimensions if captured.sizes else (),
        before=_counts(captured),
        after=_counts(faster),
        histories=histories(captured, faster),
    )


def _parameter_bytes(model: LoadedModel) -> int:
    return sum(each.nbytes for each in (*model.module.parameters(), *model.module.buffers()))


def _counts(program: Program) -> schema.ProgramCounts:
    usual = program
    if program.sizes is not None:
        point = program.sizes.usual
        usual = replace(program, example_args=point.args, example_kwargs=point.kwargs)
    return schema.ProgramCounts(
        operators_by_type=operators(program.graph_module),
        parameters=cost.parameters(program),
        flops=cost.flops(usual),
    )


def _described_inputs(program: Program) -> list[InputSpec]:
    """The inputs by the program's names for them, with the names of open dimensions."""
    graph_module = program.graph_module
    leaves = flat_inputs(graph_module, program.example_args, program.example_kwargs)
    specs = flat_inputs(graph_module, *program.sizes.arranged) if program.sizes else leaves
    return [
        InputSpec(node.name, tuple(spec.shape), str(leaf.dtype).removeprefix("torch."))
        for node, leaf, spec in zip(placeholders(graph_module.graph), leaves, specs, strict=True)
        if isinstance(leaf, torch.Tensor)
    ]


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
