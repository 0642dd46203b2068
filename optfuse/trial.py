"""Both programs on every engine: built, opened, compared with float64, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from optfuse import backends, memory, stats
from optfuse.backends import Backend, Session, TellsLayers
from optfuse.compare import drift
from optfuse.diagnose import diagnose
from optfuse.environment import activity
from optfuse.errors import EngineError, OptfuseError, UsageError
from optfuse.measure import Schedule, measure
from optfuse.report import schema
from optfuse.stages import (
    Artifact,
    BuildOptions,
    Caveat,
    Drift,
    EngineLayer,
    EngineReport,
    LayerDrifts,
    Measurement,
    Notify,
    Program,
    Variant,
)

REFERENCE = "captured program in float64"

LARGE_BYTES = 256 * 2**20
"""From parameters of this size on, engines take turns and memory is spared. All variants of eager
PyTorch and ONNX Runtime open at once take up to eleven times the parameters: 3 GB for these, which
most machines have, and soon after it is more than they have."""


@dataclass
class Findings:
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
class Inputs:
    """What the programs are run on.

    Attributes:
        at: the sizes of the open dimensions, as `Point.at`; None where none is open.
        feeds: the inputs, what latency is taken on.
        reference: the outputs in float64 of every sample, or None where there are none.
        samples: the inputs that drift is taken on, if these are not the feeds.
    """

    at: str | None
    feeds: list[torch.Tensor]
    reference: list[torch.Tensor] | None
    samples: Sequence[Sequence[torch.Tensor]] = ()


@dataclass(frozen=True)
class Trial:
    """What every engine is given alike.

    Attributes:
        parameter_bytes: size of the model's parameters and buffers.
        programs: of each variant, for engines that consume programs. Nothing else holds them, and
            they are taken away once the last of those engines is through with them.
        onnx: the ONNX file of each variant.
        others: engines -> their own file of ours, where they are given another one.
        io: the type of ours' inputs that are float32 in the model.
        inputs: what to run on: with open dimensions, one of each point.
        usual: the one of these with the sizes to be fastest at.
        options: how engines build and run.
        duration_seconds: how long latency is measured in all; 0 measures none.
        seed: of the order of the runs, and of the intervals.
    """

    parameter_bytes: int
    programs: dict[Variant, Program]
    onnx: dict[Variant, Artifact]
    inputs: Sequence[Inputs]
    usual: Inputs
    options: BuildOptions
    duration_seconds: float
    seed: int
    others: Mapping[str, Artifact] = field(default_factory=dict)
    io: torch.dtype = torch.float32

    @property
    def is_large(self) -> bool:
        """Whether it is too large to be open several times over."""
        return is_large(self.parameter_bytes)

    def files(self, engine: str) -> dict[Variant, Artifact]:
        """The ONNX file of each variant that an engine is given."""
        return {**self.onnx, "optimized": self.others.get(engine, self.onnx["optimized"])}

    def typed(self, feeds: Sequence[torch.Tensor], variant: Variant) -> list[torch.Tensor]:
        """The inputs in the types that a variant takes."""
        if variant != "optimized":
            return list(feeds)
        return [each.to(self.io) if each.dtype == torch.float32 else each for each in feeds]


def is_large(parameter_bytes: int) -> bool:
    """Whether a model of so many bytes is too large to be open several times over."""
    return parameter_bytes >= LARGE_BYTES


AUTO = "auto"
"""Instead of an engine's name: all that work here, and which of them to take."""


def choose(
    names: Sequence[str], targets: Sequence[str], precision: str = "fp32"
) -> tuple[list[Backend], list[schema.NotMeasured]]:
    """The engines of a run, checked before any work is done.

    Args:
        names: of engines; empty for all that work here and don't take minutes to compile, `auto`
            for these as well.
        targets: compute capabilities to build for.
        precision: the lowest that they are given.

    Returns:
        The engines, and those that work here but not in this precision.

    Raises:
        EngineError: one that was asked for by name is missing, or has not that precision.
        UsageError: there is no engine, or no target, of a name, or nothing that a target is for.
    """
    chosen: list[Backend] = []
    left_out: list[schema.NotMeasured] = []
    asked = [name for name in names if name != AUTO]
    usual = [name for name in backends.BACKENDS if name not in backends.ONLY_BY_NAME]
    every = list(backends.BACKENDS) if AUTO in names else asked or usual
    for name in dict.fromkeys((*asked, *every)):
        backend = backends.get(name)
        missing = backend.unavailable()
        if missing is None and not (backend.builds and targets):
            missing = backend.cannot_run()
        if missing is None:
            for target in targets if backend.builds else ():
                backend.check_target(target)
            refused = backend.refuses(precision)
            if refused is None:
                chosen.append(backend)
            elif name in asked:
                raise EngineError(
                    f"The engine '{name}' cannot run the model in {precision}",
                    refused,
                    "Choose another --precision, or leave this engine out",
                )
            else:
                reason = refused[0].lower() + refused[1:] if refused[:3] == "It " else refused
                left_out.append(schema.NotMeasured(name, "optimized", None, reason))
        elif name in asked:
            raise EngineError(
                f"The engine '{name}' cannot be used here",
                backend.unavailable() or f"It cannot run: {missing}",
                "Give it a --target to build for without a GPU, such as sm_89"
                if backend.builds and backend.unavailable() is None
                else "Install what it needs, or choose from what 'optfuse engines' calls ready",
            )
    if targets and not any(backend.builds for backend in chosen):
        raise UsageError(
            f"--target {','.join(targets)} has nothing to build",
            "None of the engines of this run builds files for a GPU",
            "Add --engine tensorrt-rtx, or leave --target out",
        )
    return chosen, left_out


def put_through(
    engines: Sequence[Backend], trial: Trial, found: Findings, notify: Notify
) -> list[list[str]]:
    """Build, open, compare and measure on every engine; what is found out goes into `found`.

    Returns:
        The names of the engines, grouped by those that were open at the same time, so that their
        runs were interleaved.
    """
    turns = _turns(engines, trial)
    for number, turn in enumerate(turns):
        _make_room(turns[number:], trial)
        _take_turn(turn, trial, _seconds_of_each(turns, trial.duration_seconds), found, notify)
    found.not_measured += _unpaired(trial, found)
    _group_by_engine(found)
    return [[engine.name for engine in turn] for turn in turns]


def _group_by_engine(found: Findings) -> None:
    """Put what was found point by point in order engine by engine, each at all of its points: how
    an engine's numbers go with the sizes is what a reader looks for."""
    tables: list[list[Any]] = [
        *(found.drifts, found.measurements, found.comparisons, found.noise_floors)
    ]
    for table in tables:
        order = list(dict.fromkeys(row.engine for row in table))
        table.sort(key=lambda row: order.index(row.engine))


def _turns(engines: Sequence[Backend], trial: Trial) -> list[Sequence[Backend]]:
    """Which engines are open at the same time: all of them, so that their runs can be paired.

    With a large model one after the other, because each holds weights of its own; those that
    consume programs come first, because the programs can go after them.
    """
    if not trial.is_large:
        return [engines]
    return [[engine] for engine in sorted(engines, key=lambda each: each.consumes != "program")]


def _seconds_of_each(turns: Sequence[Sequence[Backend]], duration_seconds: float) -> float:
    """The time for latency, divided among the turns that have an engine to run."""
    return duration_seconds / max(1, sum(map(can_run, turns)))


def _make_room(coming: Sequence[Sequence[Backend]], trial: Trial) -> None:
    """With a large model, free what none of the turns to come needs."""
    if not trial.is_large:
        return
    if not any(engine.consumes == "program" for turn in coming for engine in turn):
        trial.programs.clear()
    memory.give_back()


def can_run(engines: Sequence[Backend]) -> bool:
    """Whether one of them can run what it builds."""
    return any(engine.cannot_run() is None for engine in engines)


def _take_turn(
    engines: Sequence[Backend],
    trial: Trial,
    seconds: float,
    found: Findings,
    notify: Notify,
) -> None:
    """Open, compare, measure and close these engines; with open dimensions, at point by point."""
    with ExitStack() as stack:
        with memory.freed_at_once(trial.is_large):
            sessions = _open_all(engines, trial, found, stack, notify)
        if seconds <= 0:
            _not_measured(sessions, "no time was given to it (--duration 0)", None, found)
        for inputs in trial.inputs:
            with memory.freed_at_once(trial.is_large):
                bound = _bind_all(sessions, inputs, trial, found, notify)
            bound = _compare_all(bound, inputs, trial, found)
            if bound and seconds > 0:
                _measure_all(bound, seconds / len(trial.inputs), inputs, trial, found, notify)
        _inspect(sessions, found)


Opened = list[tuple[str, Variant, Session]]
"""Engine, variant and session of each."""


def _open_all(
    engines: Sequence[Backend],
    trial: Trial,
    found: Findings,
    stack: ExitStack,
    notify: Notify,
) -> Opened:
    """Open the export as it comes, the same once more as a control, and ours, on every engine.

    With a large model the control is the first session under a second name: it shows the noise of
    the runs all the same, though not what a second copy of the weights would add to it.
    """
    opened: Opened = []
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
            _failed(backend.name, error, None, found)
    return opened


def _failed(engine: str, error: EngineError, at: str | None, found: Findings) -> None:
    found.failures.append(error)
    found.not_measured.append(
        schema.NotMeasured(engine, None, None, f"it failed: {error.cause}", at)
    )


def _bind_all(
    sessions: Opened, inputs: Inputs, trial: Trial, found: Findings, notify: Notify
) -> Opened:
    """Hand the inputs over and run once, on every engine.

    Returns:
        The sessions of the engines that can be run on them.
    """
    bound: Opened = []
    for engine in dict.fromkeys(engine for engine, _, _ in sessions):
        notify(f"Running {engine}{f' at {inputs.at}' if inputs.at else ''}", None)
        own = [each for each in sessions if each[0] == engine]
        try:
            # The control may be the session of the baseline.
            each_once = {id(session): (variant, session) for _, variant, session in own}
            for variant, session in each_once.values():
                session.bind(trial.typed(inputs.feeds, variant))
                session.run()
        except EngineError as error:
            _failed(engine, error, inputs.at, found)
        else:
            bound += own
    return bound


def _runnable(
    backend: Backend, trial: Trial, found: Findings, notify: Notify
) -> Mapping[Variant, Artifact | Program]:
    """What the engine can open of each variant; nothing where it only builds."""
    if backend.consumes == "program":
        return trial.programs
    files = trial.files(backend.name)
    if not backend.builds:
        return files
    built = _build(backend, files, trial.options, found, notify)
    return built if "optimized" in built else {}


def _open(
    backend: Backend,
    program: Artifact | Program,
    trial: Trial,
    stack: ExitStack,
    notify: Notify,
) -> Session:
    notify(f"Opening {backend.name}", None)
    return stack.enter_context(backend.open(program, trial.options))


def _build(
    backend: Backend,
    onnx: Mapping[Variant, Artifact],
    options: BuildOptions,
    found: Findings,
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


def _compare_all(sessions: Opened, inputs: Inputs, trial: Trial, found: Findings) -> Opened:
    """The drift of every engine's outputs from the captured program in float64.

    Returns:
        The sessions of the engines that ran on every sample, bound to the feeds as before.
    """
    failed = set()
    for engine, variant, session in sessions:
        if inputs.reference is None or variant == "control" or engine in failed:
            continue
        try:
            outputs = _outputs(session, variant, inputs, trial)
        except EngineError as error:
            _failed(engine, error, inputs.at, found)
            failed.add(engine)
            continue
        moved = drift(
            outputs, inputs.reference, engine=engine, variant=variant, reference_name=REFERENCE
        )
        found.drifts.append(replace(moved, at=inputs.at))
    return [each for each in sessions if each[0] not in failed]


def _outputs(
    session: Session, variant: Variant, inputs: Inputs, trial: Trial
) -> list[torch.Tensor]:
    """Of all samples, one after the other; of the feeds where there are none."""
    if not inputs.samples:
        return session.fetch()
    outputs = []
    for sample in inputs.samples:
        session.bind(trial.typed(sample, variant))
        session.run()
        outputs += session.fetch()
    session.bind(trial.typed(inputs.feeds, variant))
    session.run()
    return outputs


def _inspect(sessions: Opened, found: Findings) -> None:
    """Put what an engine tells of its layers now that it ran, their times above all, in the place
    of what its builder told."""
    told: dict[tuple[str, Variant], tuple[EngineLayer, ...]] = {
        (engine, variant): session.layers()
        for engine, variant, session in sessions
        if variant != "control" and isinstance(session, TellsLayers)
    }
    found.engine_reports = [
        replace(report, layers=told[report.engine, report.variant] or report.layers)
        if report.not_measured is None and (report.engine, report.variant) in told
        else report
        for report in found.engine_reports
    ]


def _measure_all(
    sessions: Opened,
    seconds: float,
    inputs: Inputs,
    trial: Trial,
    found: Findings,
    notify: Notify,
) -> None:
    """Latency of everything that is bound, in one interleaved run, the ratios within it, and what
    makes them doubtful."""
    before = activity()
    try:
        taken = measure(
            sessions, schedule=Schedule(budget_seconds=seconds), seed=trial.seed, notify=notify
        )
    except EngineError as error:
        found.failures.append(error)
        _not_measured(sessions, f"an engine failed: {error.cause}", inputs.at, found)
        return
    measured = [replace(each, at=inputs.at) for each in taken]
    comparisons, floors = _ratios(measured, trial.seed)
    found.measurements += measured
    found.comparisons += comparisons
    found.noise_floors += floors
    caveats = diagnose(
        measured,
        before,
        activity(),
        threads=trial.options.threads,
        asked_devices=dict.fromkeys(backends.ON_GPU, "gpu"),
    )
    where = f" at {inputs.at}" if inputs.at else ""
    found.warnings += [replace(caveat, about=f"{caveat.about}{where}") for caveat in caveats]


def _not_measured(sessions: Opened, reason: str, at: str | None, found: Findings) -> None:
    for engine in dict.fromkeys(engine for engine, _, _ in sessions):
        found.not_measured.append(schema.NotMeasured(engine, None, None, reason, at))


def _unpaired(trial: Trial, found: Findings) -> list[schema.NotMeasured]:
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


def _ratios(
    measurements: Sequence[Measurement], seed: int
) -> tuple[list[schema.Comparison], list[schema.NoiseFloor]]:
    """Ours against the export as it comes on the same engine, and against eager PyTorch.

    Args:
        measurements: of one interleaved run; only those can be paired.
    """
    [at] = {each.at for each in measurements}
    blocks = {(each.engine, each.variant): each.blocks for each in measurements}
    comparisons, floors = [], []
    for engine in dict.fromkeys(each.engine for each in measurements):
        against: tuple[tuple[str, Variant], ...] = ((engine, "baseline"), ("torch", "baseline"))
        for other, variant in dict.fromkeys(against):
            if (other, variant) in blocks:
                ratio = stats.paired_ratio(
                    blocks[other, variant], blocks[engine, "optimized"], seed=seed
                )
                comparisons.append(
                    schema.Comparison(engine, "optimized", other, variant, ratio, at)
                )
        control = stats.paired_ratio(
            blocks[engine, "baseline"], blocks[engine, "control"], seed=seed
        )
        floors.append(schema.NoiseFloor(engine, control, at))
    return comparisons, floors
