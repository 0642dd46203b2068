"""The whole program, from a model's source to its report; read it from top to bottom."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from optfuse import backends, cost, memory
from optfuse.ablate import ablate
from optfuse.backends import Backend
from optfuse.builder_findings import BuilderFinding, findings
from optfuse.capture import capture
from optfuse.environment import environment
from optfuse.errors import (
    FunctionChangedError,
    ModelError,
    OptfuseError,
    UsageError,
)
from optfuse.explain import fitting, histories, norms_left, places_elsewhere
from optfuse.export import data_file, export_baseline
from optfuse.files import cache_folder, sha256, staged, write_text, writing
from optfuse.float64 import run_float64, torch_threads
from optfuse.graph import flat_inputs, operators, placeholders
from optfuse.layers import compare_layers
from optfuse.load import load
from optfuse.lower import Timing, lower, with_random_data
from optfuse.measure import Schedule
from optfuse.optimize import optimize, select
from optfuse.passes import Pass
from optfuse.precision.int8 import SCHEMES
from optfuse.precision.lowered import Lowered, told
from optfuse.precision.plan import Plan, check
from optfuse.precision.trials import float64_outputs, split
from optfuse.recommend import Recommendation, recommend
from optfuse.report import markdown, schema
from optfuse.samples import Wanted, read_samples, require_file, require_finite
from optfuse.stages import (
    Artifact,
    BuildOptions,
    Caveat,
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
    AUTO,
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
        plan: the precision.
        data: inputs to calibrate on and to take drift on, in a `.npz`, `.npy` or `.safetensors`.
        random_calibration: calibrate on random inputs where there is no data.
        version_compatible, hardware_compatible: as `BuildOptions` has them.
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
    plan: Plan = field(default_factory=Plan)
    data: Path | None = None
    random_calibration: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
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
    _check(request)
    engines, left_out = choose(request.engines, request.targets, request.plan.lowest)
    if request.version_compatible or request.hardware_compatible:
        engines, unable = _able_to_build(engines, request)
        left_out += unable
    _require_something_to_ablate(request)
    machine = environment(request.threads)  # now, so that its load is not our own
    with torch_threads(request.threads):
        return _run(request, machine, engines, left_out, notify)


def _run(
    request: Request,
    machine: Mapping[str, Any],
    engines: Sequence[Backend],
    left_out: Sequence[schema.NotMeasured],
    notify: Notify,
) -> Outcome:
    selected = select(request.passes)
    notify(f"Loading {request.source.text}", None)
    model = load(request.source)
    output = request.output or Path("out") / model.name
    with staged(output):
        pass  # the folder can be written to: said now rather than after minutes of work
    parameter_bytes = _parameter_bytes(model)
    found = Findings(output, not_measured=list(left_out))
    found.warnings += _widened(engines, request.plan)

    with memory.freed_at_once(is_large(parameter_bytes)):
        notify(f"Capturing {model.name} with torch.export", None)
        captured = capture(model)
        faster = optimize(captured, selected, seed=request.source.seed, notify=notify)
        plan, sample_count = _with_data(request, captured)
        inputs = _inputs(captured, engines, plan, found, notify)
        # It takes five runs in step, and has no figure for what a precision costs.
        if not is_large(parameter_bytes) and plan.precision == "fp32":
            found.layers = _layers(captured, faster, request.source.seed, notify)
        # Both files appear together, or none does.
        with staged(output) as folder:
            notify("Exporting ONNX as it comes", None)
            baseline = export_baseline(
                captured, folder / "baseline.onnx", output_names=request.output_names
            )
            options = BuildOptions(
                targets=request.targets,
                threads=request.threads,
                cache=cache_folder(),
                shapes=_profile(baseline, inputs, _usual(captured)),
                version_compatible=request.version_compatible,
                hardware_compatible=request.hardware_compatible,
            )
            lowered = lower(
                faster,
                plan,
                folder / "model.onnx",
                captured=captured,
                engines=[engine.name for engine in engines],
                input_names=baseline.input_names,
                output_names=baseline.output_names,
                timing=_timing(engines, options, request),
                threads=request.threads,
                notify=notify,
            )
            _clear(output)
        baseline, lowered = _moved(baseline, output), lowered.moved(output)

    written = [baseline, lowered.artifact, *lowered.others.values()]
    found.artifacts += [*written, *_weights(*written)]
    found.warnings += lowered.caveats
    found.failures += _out_of_reach(lowered, captured.name)
    described = _describe(selected, captured, faster)
    undone = _changed_functions(request, faster)
    trial = Trial(
        parameter_bytes,
        programs={"baseline": captured, "optimized": lowered.program or faster},
        onnx={"baseline": baseline, "optimized": lowered.artifact},
        inputs=inputs,
        usual=next(each for each in inputs if each.at == _usual(captured)),
        options=options,
        duration_seconds=request.duration_seconds,
        seed=request.source.seed,
        others={engine.name: lowered.file_for(engine.name) for engine in engines},
        io=plan.io_dtype,
    )
    # The trial alone holds the programs now, and lets go of them in time. (A pass still holds
    # nodes of the last graph that it went through.)
    del model, captured, faster, selected
    lowered = replace(lowered, program=None)
    interleaved = put_through(engines, trial, found, notify)
    if request.ablate:
        _ablate(engines, trial, request, found, notify)

    report = _report(request, machine, interleaved, described, lowered, sample_count, found)
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
    usual: str | None
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


def _check(request: Request) -> None:
    """Refuse what contradicts itself, before any work is done.

    Raises:
        UsageError: options that exclude each other, or that something else has to go with.
        LoadError: there is no such file as --data.
    """
    check(request.plan)
    int8 = request.plan.lowest == "int8"
    thing = "--random-calibration cannot be used like this"
    if request.random_calibration and request.data is not None:
        raise UsageError(thing, "There is --data to calibrate on", "Leave one of them out")
    if request.random_calibration and not int8:
        raise UsageError(thing, f"Nothing is calibrated for {request.plan.lowest}", "Leave it out")
    if int8 and request.data is None and not request.random_calibration:
        raise UsageError(
            "The ranges for int8 cannot be taken",
            "There is no data to take them from",
            "Give your own inputs with --data, or, for latency alone, --random-calibration",
        )
    if request.data is not None:
        require_file(request.data)


def _able_to_build(
    engines: Sequence[Backend], request: Request
) -> tuple[list[Backend], list[schema.NotMeasured]]:
    """The engines without those that cannot build the compatible files that are asked for.

    Raises:
        UsageError: one of those was asked for by name, or no other builds files.
    """
    options = BuildOptions(
        version_compatible=request.version_compatible,
        hardware_compatible=request.hardware_compatible,
    )
    able: list[Backend] = []
    refused: dict[str, UsageError] = {}
    for engine in engines:
        try:
            engine.check_options(options)
            able.append(engine)
        except UsageError as error:
            refused[engine.name] = error
    without_effect = not any(engine.builds for engine in able)
    for name, refusal in refused.items():
        if without_effect or name in request.engines:
            raise refusal
    if without_effect:
        builder = "tensorrt" if request.version_compatible else "tensorrt-rtx"
        raise UsageError(
            "No engine file can be compatible with others",
            "None of the engines of this run builds files",
            f"Add --engine {builder}, or leave out what asks for compatible engines",
        )
    reasons = {name: each.cause[0].lower() + each.cause[1:] for name, each in refused.items()}
    return able, [
        schema.NotMeasured(name, "optimized", None, reason) for name, reason in reasons.items()
    ]


def _clear(output: Path) -> None:
    """Take away what an earlier run left that would not fit the files that come now. Only names
    that a run writes: the folder may hold the user's own files as well."""
    models = [output / f"{name}.onnx" for name in ("baseline", "model")]
    models += [output / f"model.{scheme}.onnx" for scheme in SCHEMES]
    stale = [*models[2:], *map(data_file, models), output / "report.json", output / "report.md"]
    # The description goes first: an engine without it is not opened.
    engines = [
        path
        for name in backends.BACKENDS
        for variant in ("baseline", "optimized")
        for ending in (".engine.json", ".engine")
        for path in sorted((output / "engines" / name).glob(f"sm_*.{variant}{ending}"))
    ]
    with writing("The results", output):
        for path in (*stale, *engines):
            path.unlink(missing_ok=True)


def _moved(artifact: Artifact, folder: Path) -> Artifact:
    return replace(artifact, path=folder / artifact.path.name)


def _out_of_reach(lowered: Lowered, name: str) -> list[OptfuseError]:
    """What is said of a mixture that does not keep to its limit, since not even float32 does."""
    searched = lowered.searched
    if searched is None or searched.choice.point.within:
        return []
    least = searched.choice.point.relative_l2
    return [
        OptfuseError(
            f"No mixture of '{name}' stays within --max-drift {searched.max_drift:g}",
            f"Even with every layer in float32 the drift is {least:.2g}",
            "Raise the limit above that",
        )
    ]


def _widened(engines: Sequence[Backend], plan: Plan) -> list[Caveat]:
    """A caveat for each engine that computes in a higher precision than it is given."""
    return [
        Caveat(
            kind="widened",
            about=engine.name,
            finding=reason,
            cause=f"It has no kernels in {plan.lowest} here",
            next_step="Expect a smaller file and no speed from it, or choose another --precision",
        )
        for engine in engines
        if (reason := engine.widens(plan.lowest)) is not None
    ]


def _with_data(request: Request, captured: Program) -> tuple[Plan, int | None]:
    """The plan, with the inputs that the user gave or asked to be drawn; and how many were given,
    None for none.

    Raises:
        LoadError: the file cannot be read.
        UsageError: its arrays do not fit the model's inputs, or are not finite.
    """
    plan = request.plan
    if request.data is not None:
        graph_module, point = captured.graph_module, _at_usual(captured)
        leaves = flat_inputs(graph_module, point.example_args, point.example_kwargs)
        wanted = [
            Wanted(str(node.target), str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))
            for node, leaf in zip(placeholders(graph_module.graph), leaves, strict=True)
            if isinstance(leaf, torch.Tensor)
        ]
        samples = read_samples(request.data, wanted)
        require_finite(request.data, samples, wanted)
        calibrating, judging = split(samples)
        return replace(plan, calibration=calibrating, judging=judging), len(samples)
    if request.random_calibration and plan.lowest == "int8":
        return with_random_data(plan, _at_usual(captured), request.source.seed), None
    return plan, None


def _timing(engines: Sequence[Backend], options: BuildOptions, request: Request) -> Timing | None:
    """Where the candidates of a mixture are timed: on the first engine that runs here and has no
    build step; nowhere where no latency is asked for."""
    for engine in engines if request.duration_seconds > 0 else ():
        if engine.cannot_run() is None and not engine.builds:
            schedule = Schedule(budget_seconds=request.duration_seconds)
            return Timing(engine.name, options, request.source.seed, schedule)
    return None


def _inputs(
    captured: Program, engines: Sequence[Backend], plan: Plan, found: Findings, notify: Notify
) -> list[Inputs]:
    """What every engine is run on, with the captured program's outputs in float64; None where
    nothing is compared with them, or where it does not run in float64.

    With data of the user's own, drift is taken on that, at the usual sizes.
    """
    inputs = []
    for at, args, kwargs in _points(captured):
        feeds = _tensors(flat_inputs(captured.graph_module, args, kwargs))
        samples = plan.judging if at == _usual(captured) and not plan.drawn else ()
        reference = None
        if can_run(engines):
            notify(f"Running the float64 reference{f' at {at}' if at else ''}", None)
            try:
                reference = (
                    float64_outputs(_at_usual(captured), samples)
                    if samples
                    else _tensors(run_float64(captured.graph_module, args, kwargs))
                )
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
        inputs.append(Inputs(at, list(samples[0]) if samples else feeds, reference, samples))
    return inputs


def _points(program: Program) -> list[tuple[str | None, tuple[Any, ...], Mapping[str, Any]]]:
    """Where drift and latency are taken: the examples or, with open dimensions, each point."""
    if program.sizes is None:
        return [(None, program.example_args, program.example_kwargs)]
    return [(point.at, point.args, point.kwargs) for point in program.sizes.points]


def _usual(program: Program) -> str | None:
    return None if program.sizes is None else program.sizes.usual.at


def _at_usual(program: Program) -> Program:
    """The program with the examples that it is to be fastest at."""
    if program.sizes is None:
        return program
    point = program.sizes.usual
    return replace(program, example_args=point.args, example_kwargs=point.kwargs)


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
    if request.plan.precision != "fp32":
        raise UsageError(
            "What each pass earned cannot be measured",
            f"--ablate measures passes in float32, and --precision is {request.plan.precision}",
            "Leave one of them out",
        )
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
    lowered: Lowered,
    sample_count: int | None,
    found: Findings,
) -> Report:
    plan, has_data = lowered.plan, sample_count is not None
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
            "precision": plan.precision,
            "io_precision": plan.io,
            "max_drift": plan.max_drift,
            "data": None if request.data is None else str(request.data),
            "samples": sample_count,
            "calibrated_on": len(plan.calibration) if has_data and plan.lowest == "int8" else None,
            "judged_on": len(plan.judging) if has_data else None,
        },
        inputs=described.inputs,
        dimensions=described.dimensions,
        before=described.before,
        after=described.after,
        steps=lowered.artifact.trace,
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
        precision=told(lowered),
        recommendation=_recommended(request, interleaved, described, found),
        builder_findings=_builder_findings(lowered, found),
        directory=found.output,
    )


def _recommended(
    request: Request,
    interleaved: Sequence[Sequence[str]],
    described: _Described,
    found: Findings,
) -> Recommendation | None:
    """With --engine auto, what to deploy; with open dimensions, at the usual sizes."""
    if AUTO not in request.engines:
        return None
    return recommend(
        [each for each in found.measurements if each.at == described.usual],
        [each for each in found.drifts if each.at == described.usual],
        interleaved,
        seed=request.source.seed,
    )


def _builder_findings(
    lowered: Lowered, found: Findings
) -> dict[tuple[str, str], tuple[BuilderFinding, ...]]:
    """What each builder does by itself of what the passes did. A lower precision makes layers of
    its own, so that engines in it are not compared."""
    if lowered.plan.precision != "fp32":
        return {}
    reports = {(each.engine, each.target, each.variant): each for each in found.engine_reports}
    baseline = next(each.path for each in found.artifacts if each.variant == "baseline")
    return {
        (engine, target): findings(
            report,
            reports[engine, target, "optimized"],
            lowered.artifact.trace,
            baseline,
            lowered.artifact.path,
        )
        for (engine, target, variant), report in reports.items()
        if variant == "baseline" and (engine, target, "optimized") in reports
    }


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
        usual=_usual(captured),
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
        flops=cost.flops(_at_usual(program)),
    )


def _described_inputs(program: Program) -> list[InputSpec]:
    """The inputs by the program's names for them, with the names of open dimensions."""
    graph_module = program.graph_module
    leaves = flat_inputs(graph_module, program.example_args, program.example_kwargs)
    specs = flat_inputs(graph_module, *program.sizes.arranged) if program.sizes else leaves
    return [
        InputSpec(str(node.target), tuple(spec.shape), str(leaf.dtype).removeprefix("torch."))
        for node, leaf, spec in zip(placeholders(graph_module.graph), leaves, specs, strict=True)
        if isinstance(leaf, torch.Tensor)
    ]


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
