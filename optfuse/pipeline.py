"""The whole program, from a model's source to its report; read it from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optfuse import backends, cost, stats
from optfuse.backends import Backend, Session
from optfuse.capture import capture
from optfuse.compare import drift
from optfuse.environment import environment
from optfuse.errors import EngineError, FunctionChangedError, ModelError, OptfuseError
from optfuse.export import data_file, export, export_baseline
from optfuse.files import sha256, staged, write_text
from optfuse.float64 import run_float64
from optfuse.graph import flat_inputs, operators, placeholders
from optfuse.load import load
from optfuse.measure import Schedule, measure
from optfuse.optimize import optimize, select
from optfuse.passes import Pass
from optfuse.report import markdown, schema
from optfuse.stages import (
    Artifact,
    BuildOptions,
    Drift,
    EngineReport,
    InputSpec,
    Measurement,
    Notify,
    Program,
    Report,
    Source,
    Variant,
    silent,
)

REFERENCE = "captured program in float64"


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
    selected = select(request.passes)
    engines = _choose(request)
    machine = environment(request.threads)  # now, so that its load is not our own
    with _torch_threads(request.threads):
        return _run(request, machine, selected, engines, notify)


def _run(
    request: Request,
    machine: Mapping[str, Any],
    selected: Sequence[Pass],
    engines: Sequence[Backend],
    notify: Notify,
) -> Outcome:
    notify(f"Loading {request.source.text}", None)
    model = load(request.source)
    output = request.output or Path("out") / model.name
    with staged(output):
        pass  # the folder can be written to: said now rather than after minutes of work
    notify(f"Capturing {model.name} with torch.export", None)
    captured = capture(model)
    faster = optimize(captured, selected, seed=request.source.seed, notify=notify)

    notify("Exporting ONNX as it comes", None)
    baseline = export_baseline(captured, output / "baseline.onnx")
    notify("Exporting optimized ONNX", None)
    optimized = export(
        faster,
        output / "model.onnx",
        input_names=baseline.input_names,
        output_names=baseline.output_names,
    )

    found = _Findings(output, artifacts=[baseline, optimized, *_weights(baseline, optimized)])
    with ExitStack() as stack:
        sessions = _open_all(captured, faster, engines, request, found, stack, notify)
        _compare_all(captured, sessions, found, notify)
        _measure_all(sessions, request, found, notify)

    report = _report(request, machine, selected, engines, captured, faster, optimized, found)
    write_text(output / "report.json", schema.dump(report))
    write_text(output / "report.md", markdown.render(report))
    return Outcome(report, (*_changed_functions(request, faster), *found.failures))


def explain(source: Source, passes: str, notify: Notify = silent) -> Program:
    """Run the passes alone; the program's trace says what each one did and left, and why.

    Raises:
        OptfuseError: the model cannot be loaded or captured, or a pass does not exist.
    """
    selected = select(passes)
    notify(f"Loading {source.text}", None)
    model = load(source)
    notify(f"Capturing {model.name} with torch.export", None)
    return optimize(capture(model), selected, seed=source.seed, notify=notify)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """PyTorch's thread count, for the proofs and the reference as well as for its own engine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Findings:
    """What one run found out so far, and the folder its files are in."""

    output: Path
    artifacts: list[Artifact]
    engine_reports: list[EngineReport] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    not_measured: list[schema.NotMeasured] = field(default_factory=list)
    failures: list[OptfuseError] = field(default_factory=list)


def _choose(request: Request) -> list[Backend]:
    """The engines of this run, checked before any work is done.

    Raises:
        EngineError: one that was asked for by name is missing.
        UsageError: there is no engine, or no target, of a name.
    """
    chosen = []
    for name in request.engines or backends.BACKENDS:
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


def _open_all(
    captured: Program,
    faster: Program,
    engines: Sequence[Backend],
    request: Request,
    found: _Findings,
    stack: ExitStack,
    notify: Notify,
) -> list[tuple[str, Variant, Session]]:
    """Open the export as it comes, the same once more as a control, and ours, on every engine."""
    onnx = {each.variant: each for each in found.artifacts if each.kind == "onnx"}
    options = BuildOptions(targets=request.targets, threads=request.threads, cache=_cache_folder())
    feeds = _tensors(flat_inputs(captured.graph_module, *_examples(captured)))
    opened: list[tuple[str, Variant, Session]] = []
    for backend in engines:
        try:
            programs: Mapping[Variant, Artifact | Program]
            if backend.consumes == "program":
                programs = {"baseline": captured, "optimized": faster}
            elif backend.builds:
                programs = _build(backend, onnx, options, found, notify)
            else:
                programs = onnx
            if backend.builds and "optimized" not in programs:
                continue  # its engine reports say why they are not measured
            for variant, of in _with_control(programs):
                notify(f"Opening {backend.name}", None)
                session = stack.enter_context(backend.open(of, options))
                session.bind(feeds)
                session.run()
                opened.append((backend.name, variant, session))
        except EngineError as error:
            found.failures.append(error)
            found.not_measured.append(
                schema.NotMeasured(backend.name, None, None, f"it failed: {error.cause}")
            )
            opened = [each for each in opened if each[0] != backend.name]
    return opened


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


def _with_control(
    programs: Mapping[Variant, Artifact | Program],
) -> list[tuple[Variant, Artifact | Program]]:
    return [
        ("baseline", programs["baseline"]),
        ("control", programs["baseline"]),
        ("optimized", programs["optimized"]),
    ]


def _compare_all(
    captured: Program,
    sessions: Sequence[tuple[str, Variant, Session]],
    found: _Findings,
    notify: Notify,
) -> None:
    """The drift of every engine's outputs from the captured program in float64."""
    if not sessions:
        return
    notify("Running the float64 reference", None)
    try:
        reference = _tensors(run_float64(captured.graph_module, *_examples(captured)))
    except Exception as error:
        found.failures.append(
            ModelError(
                f"The drift of '{captured.name}' cannot be taken",
                f"It does not run in float64: {type(error).__name__}",
                "Use the report's latency alone, or leave out of the model what needs float32",
            )
        )
        return
    for engine, variant, session in sessions:
        if variant != "control":
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
    request: Request,
    found: _Findings,
    notify: Notify,
) -> None:
    """Latency of everything that is open, in one interleaved run."""
    if request.duration_seconds <= 0:
        _not_measured(sessions, "no time was given to it (--duration 0)", found)
    elif sessions:
        try:
            found.measurements = measure(
                sessions,
                schedule=Schedule(budget_seconds=request.duration_seconds),
                seed=request.source.seed,
                notify=notify,
            )
        except EngineError as error:
            found.failures.append(error)
            _not_measured(sessions, f"an engine failed: {error.cause}", found)


def _not_measured(
    sessions: Sequence[tuple[str, Variant, Session]], reason: str, found: _Findings
) -> None:
    for engine in dict.fromkeys(engine for engine, _, _ in sessions):
        found.not_measured.append(schema.NotMeasured(engine, None, None, reason))


def _report(
    request: Request,
    machine: Mapping[str, Any],
    selected: Sequence[Pass],
    engines: Sequence[Backend],
    captured: Program,
    faster: Program,
    optimized: Artifact,
    found: _Findings,
) -> Report:
    comparisons, floors = _ratios(found.measurements, request.source.seed)
    return schema.assemble(
        name=captured.name,
        source=request.source,
        command=request.command,
        environment=machine,
        settings={
            "passes": [str(each) for each in selected],
            "engines": [engine.name for engine in engines],
            "targets": list(request.targets),
            "seed": request.source.seed,
            "threads": request.threads,
            "duration_seconds": request.duration_seconds,
        },
        inputs=_described_inputs(captured),
        before=_counts(captured),
        after=_counts(faster),
        steps=optimized.trace,
        drifts=found.drifts,
        measurements=found.measurements,
        comparisons=comparisons,
        noise_floors=floors,
        engine_reports=found.engine_reports,
        artifacts=found.artifacts,
        not_measured=found.not_measured,
        directory=found.output,
    )


def _ratios(
    measurements: Sequence[Measurement], seed: int
) -> tuple[list[schema.Comparison], list[schema.NoiseFloor]]:
    """Ours against the export as it comes on the same engine, and against eager PyTorch."""
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


def _cache_folder() -> Path:
    """Where timing caches are kept between builds, by the XDG convention."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "optfuse"
