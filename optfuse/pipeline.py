"""The whole program, from a model's source to its report; read it from top to bottom."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optfuse import backends, cost, memory, stats
from optfuse.ablate import ablate
from optfuse.backends import Backend, Session
from optfuse.capture import capture
from optfuse.compare import drift
from optfuse.diagnose import diagnose
from optfuse.environment import activity, environment
from optfuse.errors import (
    EngineError,
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
from optfuse.measure import Schedule, measure
from optfuse.optimize import optimize, select
from optfuse.passes import Pass
from optfuse.report import markdown, schema
from optfuse.stages import (
    Artifact,
    BuildOptions,
    Caveat,
    Drift,
    EngineReport,
    InputSpec,
    LayerDrifts,
    LayerHistory,
    LoadedModel,
    Measurement,
    Notify,
    Program,
    Report,
    Source,
    Variant,
    silent,
)

REFERENCE = "captured program in float64"

LARGE_BYTES = 256 * 2**20
"""From parameters of this size on, engines take turns and memory is spared. All variants of eager
PyTorch and ONNX Runtime open at once take up to eleven times the parameters: 3 GB for these, which
most machines have, and soon after it is more than they have."""


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
    engines = _choose(request)
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
    found = _Findings(output)

    with memory.freed_at_once(parameter_bytes >= LARGE_BYTES):
        notify(f"Capturing {model.name} with torch.export", None)
        captured = capture(model)
        faster = optimize(captured, selected, seed=request.source.seed, notify=notify)
        reference = _reference(captured, engines, found, notify)
        if parameter_bytes < LARGE_BYTES:  # it takes five runs in step
            found.layers = _layers(captured, faster, request.source.seed, notify)
        notify("Exporting ONNX as it comes", None)
        baseline = export_baseline(captured, output / "baseline.onnx")
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
    trial = _Trial(
        parameter_bytes,
        programs={"baseline": captured, "optimized": faster},
        onnx={"baseline": baseline, "optimized": optimized},
        feeds=_tensors(flat_inputs(captured.graph_module, *_examples(captured))),
        reference=reference,
        options=BuildOptions(
            targets=request.targets, threads=request.threads, cache=cache_folder()
        ),
    )
    # The trial alone holds the programs now, and lets go of them in time. (A pass still holds
    # nodes of the last graph that it went through.)
    del model, captured, faster, selected
    turns = _turns(engines, trial)
    for number, turn in enumerate(turns):
        _make_room(turns[number:], trial)
        _take_turn(turn, trial, request, _seconds_of_each(turns, request), found, notify)
    found.not_measured += _unpaired(trial, found)
    if request.ablate:
        _ablate(engines, trial, request, found, notify)

    report = _report(request, machine, turns, described, optimized, found)
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


@dataclass
class _Findings:
    """What one run found out so far, and the folder its files are in."""

    output: Path
    artifacts: list[Artifact] = field(default_factory=list)
    engine_reports: list[EngineReport] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    comparisons: list[schema.Comparison] = field(default_factory=list)
    noise_floors: list[schema.NoiseFloor] = field(default_factory=list)
    not_measured: list[schema.NotMeasured] = field(default_factory=list)
    warnings: list[Caveat] = field(default_factory=list)
    layers: LayerDrifts | None = None
    ablation: tuple[schema.Ablated, ...] = ()
    failures: list[OptfuseError] = field(default_factory=list)


@dataclass(frozen=True)
class _Described:
    """What the report says of the programs and the passes, taken while they are there."""

    passes: list[str]
    name: str
    inputs: list[InputSpec]
    before: schema.ProgramCounts
    after: schema.ProgramCounts
    histories: tuple[LayerHistory, ...]


@dataclass(frozen=True)
class _Trial:
    """What every engine is given alike.

    Attributes:
        parameter_bytes: size of the model's parameters and buffers.
        programs: of each variant, for engines that consume programs. Nothing else holds them, and
            they are taken away once the last of those engines is through with them.
        onnx: the ONNX file of each variant.
        feeds: the inputs to run on.
        reference: the outputs in float64, or None where there are none.
        options: how engines build and run.
    """

    parameter_bytes: int
    programs: dict[Variant, Program]
    onnx: dict[Variant, Artifact]
    feeds: list[torch.Tensor]
    reference: list[torch.Tensor] | None
    options: BuildOptions

    @property
    def is_large(self) -> bool:
        """Whether it is too large to be open several times over."""
        return self.parameter_bytes >= LARGE_BYTES


def _choose(request: Request) -> list[Backend]:
    """The engines of this run, checked before any work is done.

    Raises:
        EngineError: one that was asked for by name is missing.
        UsageError: there is no engine, or no target, of a name.
    """
    chosen = []
    every = [name for name in backends.BACKENDS if name not in backends.ONLY_BY_NAME]
    for name in request.engines or every:
        backend = backends.get(name)
        missing = backend.unavailable()
        if missing is None and not (backend.builds and request.targets):
            missing = backend.cannot_run()
        if missing is None:
            for target in request.targets if backend.builds else ():
                backend.check_target(target)
            chosen.append(backend)
        elif request.engines:
            raise EngineError(
                f"The engine '{name}' cannot be used here",
                backend.unavailable() or f"It cannot run: {missing}",
                "Give it a --target to build for without a GPU, such as sm_89"
                if backend.builds and backend.unavailable() is None
                else "Install what it needs, or choose from what 'optfuse engines' calls ready",
            )
    return chosen


def _weights(*exported: Artifact) -> list[Artifact]:
    """The second files of ONNX files that have one."""
    found = []
    for artifact in exported:
        path = data_file(artifact.path)
        if path.is_file():
            size_bytes = path.stat().st_size
            found.append(Artifact(path, "weights", sha256(path), size_bytes, artifact.variant))
    return found


def _turns(engines: Sequence[Backend], trial: _Trial) -> list[Sequence[Backend]]:
    """Which engines are open at the same time: all of them, so that their runs can be paired.

    With a large model one after the other, because each holds weights of its own; those that
    consume programs come first, because the programs can go after them.
    """
    if not trial.is_large:
        return [engines]
    return [[engine] for engine in sorted(engines, key=lambda each: each.consumes != "program")]


def _seconds_of_each(turns: Sequence[Sequence[Backend]], request: Request) -> float:
    """The time for latency, divided among the turns that have an engine to run."""
    return request.duration_seconds / max(1, sum(map(_can_run, turns)))


def _make_room(coming: Sequence[Sequence[Backend]], trial: _Trial) -> None:
    """With a large model, free what none of the turns to come needs."""
    if not trial.is_large:
        return
    if not any(engine.consumes == "program" for turn in coming for engine in turn):
        trial.programs.clear()
    memory.give_back()


def _can_run(engines: Sequence[Backend]) -> bool:
    return any(engine.cannot_run() is None for engine in engines)


def _take_turn(
    engines: Sequence[Backend],
    trial: _Trial,
    request: Request,
    seconds: float,
    found: _Findings,
    notify: Notify,
) -> None:
    """Open, compare, measure and close these engines."""
    with ExitStack() as stack:
        with memory.freed_at_once(trial.is_large):
            sessions = _open_all(engines, trial, found, stack, notify)
        _compare_all(sessions, trial.reference, found)
        _measure_all(sessions, seconds, request, found, notify)


def _open_all(
    engines: Sequence[Backend],
    trial: _Trial,
    found: _Findings,
    stack: ExitStack,
    notify: Notify,
) -> list[tuple[str, Variant, Session]]:
    """Open the export as it comes, the same once more as a control, and ours, on every engine.

    With a large model the control is the first session under a second name: it shows the noise of
    the runs all the same, though not what a second copy of the weights would add to it.
    """
    opened: list[tuple[str, Variant, Session]] = []
    for backend in engines:
        try:
            programs = _runnable(backend, trial, found, notify)
            if not programs:
                continue  # its engine reports say why they are not measured
            first = _open(backend, programs["baseline"], trial, stack, notify)
            again = (
                first
                if trial.is_large
                else _open(backend, programs["baseline"], trial, stack, notify)
            )
            ours = _open(backend, programs["optimized"], trial, stack, notify)
            opened += [
                (backend.name, "baseline", first),
                (backend.name, "control", again),
                (backend.name, "optimized", ours),
            ]
        except EngineError as error:
            found.failures.append(error)
            found.not_measured.append(
                schema.NotMeasured(backend.name, None, None, f"it failed: {error.cause}")
            )
    return opened


def _runnable(
    backend: Backend, trial: _Trial, found: _Findings, notify: Notify
) -> Mapping[Variant, Artifact | Program]:
    """What the engine can open of each variant; nothing where it only builds."""
    if backend.consumes == "program":
        return trial.programs
    if not backend.builds:
        return trial.onnx
    built = _build(backend, trial.onnx, trial.options, found, notify)
    return built if "optimized" in built else {}


def _open(
    backend: Backend,
    program: Artifact | Program,
    trial: _Trial,
    stack: ExitStack,
    notify: Notify,
) -> Session:
    notify(f"Opening {backend.name}", None)
    session = stack.enter_context(backend.open(program, trial.options))
    session.bind(trial.feeds)
    session.run()
    return session


def _build(
    backend: Backend,
    onnx: Mapping[Variant, Artifact],
    options: BuildOptions,
    found: _Findings,
    notify: Notify,
) -> dict[Variant, Artifact | Program]:
    """Build an engine of each variant for each target; those that can run here, to be opened."""
    built: dict[Variant, Artifact | Program] = {}
    for variant, artifact in onnx.items():
        notify(f"Building {backend.name} from {artifact.path.name}", None)
        folder = found.output / "engines" / backend.name
        for engine, report in backend.build(artifact, options, folder):
            found.artifacts.append(engine)
            found.engine_reports.append(report)
            if report.not_measured is None:
                built[variant] = engine
    return built


def _reference(
    captured: Program, engines: Sequence[Backend], found: _Findings, notify: Notify
) -> list[torch.Tensor] | None:
    """The captured program's outputs in float64; None where nothing is compared with them, or
    where it does not run in float64."""
    if not _can_run(engines):
        return None
    notify("Running the float64 reference", None)
    try:
        return _tensors(run_float64(captured.graph_module, *_examples(captured)))
    except Exception as error:
        found.failures.append(
            ModelError(
                f"The drift of '{captured.name}' cannot be taken",
                f"It does not run in float64: {type(error).__name__}",
                "Use the report's latency alone, or leave out of the model what needs float32",
            )
        )
        return None


def _compare_all(
    sessions: Sequence[tuple[str, Variant, Session]],
    reference: Sequence[torch.Tensor] | None,
    found: _Findings,
) -> None:
    """The drift of every engine's outputs from the captured program in float64."""
    for engine, variant, session in sessions:
        if reference is not None and variant != "control":
            found.drifts.append(
                drift(
                    session.fetch(),
                    reference,
                    engine=engine,
                    variant=variant,
                    reference_name=REFERENCE,
                )
            )


def _measure_all(
    sessions: Sequence[tuple[str, Variant, Session]],
    seconds: float,
    request: Request,
    found: _Findings,
    notify: Notify,
) -> None:
    """Latency of everything that is open, in one interleaved run, the ratios within it, and what
    makes them doubtful."""
    seed = request.source.seed
    if seconds <= 0:
        _not_measured(sessions, "no time was given to it (--duration 0)", found)
    elif sessions:
        before = activity()
        try:
            measured = measure(
                sessions, schedule=Schedule(budget_seconds=seconds), seed=seed, notify=notify
            )
        except EngineError as error:
            found.failures.append(error)
            _not_measured(sessions, f"an engine failed: {error.cause}", found)
        else:
            comparisons, floors = _ratios(measured, seed)
            found.measurements += measured
            found.comparisons += comparisons
            found.noise_floors += floors
            found.warnings += diagnose(
                measured,
                before,
                activity(),
                threads=request.threads,
                asked_devices=dict.fromkeys(backends.ON_GPU, "gpu"),
            )


def _not_measured(
    sessions: Sequence[tuple[str, Variant, Session]], reason: str, found: _Findings
) -> None:
    for engine in dict.fromkeys(engine for engine, _, _ in sessions):
        found.not_measured.append(schema.NotMeasured(engine, None, None, reason))


def _unpaired(trial: _Trial, found: _Findings) -> list[schema.NotMeasured]:
    """The ratios to eager PyTorch that are not there because the engines took turns."""
    measured = list(dict.fromkeys(each.engine for each in found.measurements))
    against_torch = {each.engine for each in found.comparisons if each.against_engine == "torch"}
    reason = (
        f"with {trial.parameter_bytes / 1e6:.0f} MB of parameters the engines took turns to save "
        "memory, and only runs that were interleaved are compared"
    )
    return [
        schema.NotMeasured(f"{engine} against torch", None, None, reason)
        for engine in measured
        if "torch" in measured and engine not in against_torch
    ]


def _layers(captured: Program, faster: Program, seed: int, notify: Notify) -> LayerDrifts | None:
    """The drift of every layer on PyTorch; None where a layer does not run by itself or in float64,
    which costs no more than this one table."""
    notify("Comparing layer by layer", None)
    try:
        return compare_layers(captured, faster, seed=seed)
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
    engines: Sequence[Backend], trial: _Trial, request: Request, found: _Findings, notify: Notify
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
                feeds=trial.feeds,
                reference=trial.reference,
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
    found.ablation = ablation.rows
    found.failures += ablation.failures


def _report(
    request: Request,
    machine: Mapping[str, Any],
    turns: Sequence[Sequence[Backend]],
    described: _Described,
    optimized: Artifact,
    found: _Findings,
) -> Report:
    interleaved = [[engine.name for engine in turn] for turn in turns]
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


def _ratios(
    measurements: Sequence[Measurement], seed: int
) -> tuple[list[schema.Comparison], list[schema.NoiseFloor]]:
    """Ours against the export as it comes on the same engine, and against eager PyTorch.

    Args:
        measurements: of one interleaved run; only those can be paired.
    """
    blocks = {(each.engine, each.variant): each.blocks for each in measurements}
    comparisons, floors = [], []
    for engine in dict.fromkeys(each.engine for each in measurements):
        against: tuple[tuple[str, Variant], ...] = ((engine, "baseline"), ("torch", "baseline"))
        for other, variant in dict.fromkeys(against):
            if (other, variant) in blocks:
                ratio = stats.paired_ratio(
                    blocks[other, variant], blocks[engine, "optimized"], seed=seed
                )
                comparisons.append(schema.Comparison(engine, "optimized", other, variant, ratio))
        control = stats.paired_ratio(
            blocks[engine, "baseline"], blocks[engine, "control"], seed=seed
        )
        floors.append(schema.NoiseFloor(engine, control))
    return comparisons, floors


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
        before=_counts(captured),
        after=_counts(faster),
        histories=histories(captured, faster),
    )


def _parameter_bytes(model: LoadedModel) -> int:
    return sum(each.nbytes for each in (*model.module.parameters(), *model.module.buffers()))


def _counts(program: Program) -> schema.ProgramCounts:
    return schema.ProgramCounts(
        operators_by_type=operators(program.graph_module),
        parameters=cost.parameters(program),
        flops=cost.flops(program),
    )


def _described_inputs(program: Program) -> list[InputSpec]:
    leaves = flat_inputs(program.graph_module, *_examples(program))
    return [
        InputSpec(node.name, tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))
        for node, leaf in zip(placeholders(program.graph_module.graph), leaves, strict=True)
        if isinstance(leaf, torch.Tensor)
    ]


def _examples(program: Program) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return program.example_args, program.example_kwargs


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
