"""Program' -> Artifact in the precision that was asked for: fp32, fp16, bf16, int8 or a mixture.

fp16 and bf16 are written into the program, so that engines which run programs have them too; int8
is written into the ONNX file, where one scheme of rounding does not suit every engine and each has
its own file (`precision.int8`). A mixture is searched for among either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from optfuse import backends
from optfuse.errors import UsageError
from optfuse.export import export
from optfuse.files import writing
from optfuse.graph import module_path
from optfuse.measure import Schedule
from optfuse.precision import calibration, floats, int8, mixed, trials
from optfuse.precision.lowered import Lowered, Searched
from optfuse.precision.plan import Plan
from optfuse.precision.rules import ASKED
from optfuse.stages import (
    Artifact,
    BuildOptions,
    Notify,
    Program,
    Refused,
    Site,
    Step,
    silent,
)

_KEPT = "the search for a mixture lets it stay in float32"


@dataclass(frozen=True)
class Timing:
    """Where and how the candidates of a mixture are timed.

    Attributes:
        engine: a backend that can run here.
        options: how it opens a model.
        seed: of the order of the runs.
        schedule: how much is measured, of all candidates together.
    """

    engine: str
    options: BuildOptions
    seed: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(budget_seconds=20.0))


def lower(
    program: Program,
    plan: Plan,
    path: Path,
    *,
    captured: Program | None = None,
    engines: Sequence[str] = (),
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    timing: Timing | None = None,
    threads: int = 1,
    notify: Notify = silent,
) -> Lowered:
    """Write an optimised program as ONNX, in the precision of the plan.

    Args:
        program: what `optimize` gave.
        plan: see `precision.plan.check`.
        path: of the ONNX file, which appears whole or not at all; files for other engines lie
            beside it, `model.openvino.onnx` and the like.
        captured: the program before the passes, whose float64 a mixture is judged by.
        engines: that the file is for, the first one first.
        input_names, output_names: as `export` takes them.
        timing: where a mixture's candidates are timed; None chooses the one with most layers low.
        threads: of what runs on the CPU meanwhile.
        notify: told what is going on.

    Raises:
        UsageError: there is no data to calibrate on, or no layer that could be low.
        ModelError: the program does not run on the data.
        EngineError: what writes int8 is missing, or failed.
        ExportError: torch.onnx cannot translate the program.
        OutputError: a file cannot be written.
    """
    work = _Work(program, plan, tuple(engines), (input_names, output_names), threads, notify)
    searching = None if plan.precision != "mixed" else _Search(work, captured or program, timing)
    if plan.lowest == "fp32":
        lowered = Lowered(plan, program, work.exported(program, path), {})
    elif plan.lowest == "int8":
        lowered = _in_int8(work, path, searching)
    else:
        lowered = _in_floats(work, path, searching)
    for scheme in int8.SCHEMES.keys() - lowered.others.keys():
        _beside(path, scheme).unlink(missing_ok=True)  # of a run in int8 before this one
    return lowered


def _beside(path: Path, scheme: str) -> Path:
    """The file for the engines of another scheme of rounding: `model.openvino.onnx`."""
    return path.with_suffix(f".{scheme}{path.suffix}")


@dataclass(frozen=True)
class _Work:
    """What every way to lower a program is given."""

    program: Program
    plan: Plan
    engines: tuple[str, ...]
    names: tuple[Sequence[str], Sequence[str]]
    threads: int
    notify: Notify

    def exported(self, program: Program, path: Path) -> Artifact:
        """The program as ONNX."""
        self.notify("Exporting optimized ONNX", None)
        inputs, outputs = self.names
        return export(program, path, input_names=inputs, output_names=outputs)


class _Search:
    """The search for a mixture, whatever the low precision is."""

    def __init__(self, work: _Work, captured: Program, timing: Timing | None) -> None:
        self._work = work
        plan = work.plan
        self.samples = plan.judging or plan.calibration or [_examples(captured)]
        self.reference = trials.float64_outputs(captured, self.samples)
        self._timing = timing

    def found(
        self,
        layers: Sequence[str],
        drift_of: mixed.DriftOf,
        written: Callable[[Collection[str], Path], Artifact],
        made: Callable[[Collection[str]], Program] | None,
        sample: Sequence[torch.Tensor],
    ) -> Searched:
        """Which layers stay high; candidates are timed on one sample."""
        plan = self._work.plan
        assert plan.max_drift is not None
        timing = self._timing
        times: mixed.TimesOf | None = None
        if timing is not None:
            options: Any = {
                "engine": timing.engine,
                "options": timing.options,
                "schedule": timing.schedule,
                "seed": timing.seed,
            }
            consumes = backends.get(timing.engine).consumes
            if consumes == "onnx":
                times = trials.file_times(written, sample, **options)
            elif made is not None:
                times = trials.program_times(made, sample, **options)
        choice = mixed.search(
            layers, drift_of, plan.max_drift, time_of=times, notify=self._work.notify
        )
        return Searched(plan.max_drift, choice, timing.engine if timing and times else None)


def _in_floats(work: _Work, path: Path, searching: _Search | None) -> Lowered:
    """fp16 or bf16, in some layers or in all that can."""
    plan = work.plan
    work.notify(f"Writing {plan.lowest} into the program", None)
    lowering = floats.Lowering(
        work.program,
        cast(floats.Low, plan.lowest),
        io=plan.io != "fp32",
        samples=plan.calibration,
    )

    searched, count = None, len(floats.layers(work.program))
    if searching is not None:
        if not lowering.layers:
            raise _nothing_low(lowering.program().trace[-1], plan)
        inputs_as = _like(lowering.program())
        samples = [inputs_as(sample) for sample in searching.samples]
        searched = searching.found(
            lowering.layers,
            trials.program_drift(lowering.program, samples, searching.reference),
            lambda high, file: work.exported(lowering.program(high), file),
            lowering.program,
            samples[0],
        )
    program = lowering.program(() if searched is None else searched.choice.high)
    if searched is None and not program.trace[-1].sites:
        raise _nothing_low(program.trace[-1], plan)
    if searched is not None:
        program = replace(program, trace=_kept_by_search(program.trace))
        nodes = work.program.graph_module.graph.nodes
        searched = replace(searched, modules={each.name: module_path(each) for each in nodes})
    return Lowered(plan, program, work.exported(program, path), {}, count, searched)


def _nothing_low(step: Step, plan: Plan) -> UsageError:
    """Why no layer can be in a precision, told of the first."""
    cause = "It has no convolution, linear layer or matrix product"
    if step.refused:
        first = step.refused[0]
        cause = f"Of its layers none can; the first, {first.site}: {first.reason}"
    other = "Choose --precision bf16, which has the range of float32, or fp32"
    return UsageError(
        f"Nothing of the model can be written in {plan.lowest}",
        cause,
        other if plan.lowest == "fp16" else "Choose another --precision",
    )


def _in_int8(work: _Work, path: Path, searching: _Search | None) -> Lowered:
    """int8 in some layers or in all that can, one file for each scheme of rounding."""
    plan = work.plan
    schemes = list(dict.fromkeys(int8.scheme_of(each) for each in work.engines)) or ["onnxruntime"]
    room = writing("The file before int8", Path(tempfile.gettempdir()))
    with room, tempfile.TemporaryDirectory(prefix="optfuse-") as folder:
        before = work.exported(work.program, Path(folder) / path.name)
        work.notify("Calibrating int8", None)
        ranges = calibration.calibrate(
            before, plan.calibration, drawn=plan.drawn, threads=work.threads, notify=work.notify
        )
        searched, layers = None, int8.layers(before, ranges)
        if searching is not None:
            written = trials.int8_written(before, ranges, schemes[0])
            searched = searching.found(
                layers,
                trials.file_drift(
                    written, searching.samples, searching.reference, threads=work.threads
                ),
                written,
                None,
                searching.samples[0],
            )
        high = () if searched is None else searched.choice.high
        files = {}
        for number, scheme in enumerate(schemes):
            work.notify(f"Writing int8 for {scheme}", None)
            place = path if number == 0 else _beside(path, scheme)
            files[scheme] = int8.quantize(before, ranges, place, high=high, scheme=scheme)
    first = files.pop(schemes[0])
    if searched is not None:
        first = replace(first, trace=_kept_by_search(first.trace))
        step = first.trace[-1]
        modules = {each.site: each.involved.module for each in _places(step) if each.involved}
        searched = replace(searched, modules=modules)
    return Lowered(plan, None, first, files, len(layers), searched, ranges.caveat)


def _kept_by_search(trace: tuple[Step, ...]) -> tuple[Step, ...]:
    """The trace, whose last step says of the layers that stay that the search let them stay."""
    step = trace[-1]
    refused = tuple(
        replace(each, reason=_KEPT) if each.reason == ASKED else each for each in step.refused
    )
    return (*trace[:-1], replace(step, refused=refused))


def _places(step: Step) -> tuple[Site | Refused, ...]:
    return (*step.sites, *step.refused)


def _examples(program: Program) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _like(program: Program) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """Turns inputs of the model into those of a program whose own have other types."""
    types = [each.dtype for each in _examples(program)]
    return lambda sample: [each.to(dtype) for each, dtype in zip(sample, types, strict=True)]


def with_random_data(plan: Plan, program: Program, seed: int) -> Plan:
    """The plan with random inputs to calibrate on, for who asked for it."""
    drawn = calibration.random_samples(program, seed)
    calibrating, judging = trials.split(drawn)
    return replace(plan, calibration=calibrating, judging=judging, drawn=True)
