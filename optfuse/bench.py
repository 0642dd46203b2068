"""Subjects -> a report of their latencies, side by side; read it from top to bottom."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from optfuse import backends, cost, onnx_cost, stats
from optfuse.diagnose import diagnose
from optfuse.environment import activity, environment
from optfuse.errors import OptfuseError, UsageError
from optfuse.feeds import feeds_of, first_size
from optfuse.isolated import Isolated, Job
from optfuse.measure import InProcess, Schedule, Timed, interleave
from optfuse.report.bench import BatchRun, Contender, NotRun, Versus, Work, assemble
from optfuse.roofline import Ceilings, achieved, ceilings
from optfuse.stages import (
    Artifact,
    BuildOptions,
    Caveat,
    InputSpec,
    Measurement,
    Notify,
    Program,
    Report,
    silent,
)
from optfuse.subjects import Subject, opened_by, parse_subjects, require_runnable

CONTROL = " (again)"
"""What is added to the first subject's name where it is run against itself."""


@dataclass(frozen=True)
class BenchRequest:
    """What a user asked for.

    Attributes:
        subjects: SUBJECT[@ENGINE] arguments; the others are compared with the first.
        weights, inputs, seed, trust: of every model source among them, as in `Source`.
        batches: sizes of the inputs' first dimension, one run each; empty for the examples' own.
        threads: of every engine that runs on the CPU.
        schedule: how much is measured, for each batch.
        isolated: a fresh process for each subject, or all of them in this one.
        cache: a folder that keeps the machine's ceilings, or None for none.
        command: the command line that gives this report again.
    """

    subjects: tuple[str, ...]
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    seed: int = 0
    trust: bool = False
    batches: tuple[int, ...] = ()
    threads: int = 1
    schedule: Schedule = field(default_factory=Schedule)
    isolated: bool = False
    cache: Path | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The report of a bench, and what failed on the way without ending it."""

    report: Report
    failures: tuple[OptfuseError, ...]


def bench(
    request: BenchRequest,
    notify: Notify = silent,
    keep: Callable[[Report], None] = lambda _report: None,
) -> Outcome:
    """Measure subjects against each other, in one interleaved run for each batch.

    Args:
        request: what is measured, and how.
        notify: told what is going on.
        keep: given the report so far after each batch, so that an interrupted sweep keeps what it
            found.

    Raises:
        UsageError: a subject cannot be read, or takes other inputs than it is given, or these
            contradict the batches.
        OptfuseError: nothing could be measured at all.
    """
    _check(request)
    subjects = parse_subjects(
        request.subjects,
        weights=request.weights,
        inputs=request.inputs,
        seed=request.seed,
        trust=request.trust,
    )
    machine = environment(request.threads)  # now, so that its load is not our own
    settings = _settings(request)
    batches = request.batches or (None,)
    runs: list[BatchRun] = []
    failures: list[OptfuseError] = []
    contenders: dict[str, Contender] = {}
    limits: Ceilings | None = None
    for batch in batches:
        with tempfile.TemporaryDirectory(prefix="optfuse-") as folder, ExitStack() as stack:
            opened = _Opened(request, batch, Path(folder))
            opened.open_all(subjects, stack, notify)
            failures += opened.failures
            if not opened.timed:
                continue
            run = opened.run(notify)
            limits = limits or _ceilings(opened, run, request, notify)
            runs.append(_with_shares(run, limits))
            contenders.update(opened.contenders)
        report = assemble(
            contenders=list(contenders.values()),
            runs=runs,
            ceilings=None if limits is None else asdict(limits),
            command=request.command,
            environment=machine,
            settings=settings,
        )
        keep(report)
    if not runs:
        raise failures[0]
    return Outcome(report, tuple(failures))


def _check(request: BenchRequest) -> None:
    """Refuse inputs of another batch than is asked for; 1 stands for any."""
    rows = first_size(request.inputs)
    if request.batches and rows not in (None, 1, *request.batches):
        raise UsageError(
            f"--batch {','.join(map(str, request.batches))} contradicts --input",
            f"The first size of the inputs is {rows} there",
            "Leave one of them out, or write that size as 1",
        )


@dataclass
class _Opened:
    """The subjects of one batch, open and ready to be timed, the first one twice."""

    request: BenchRequest
    batch: int | None
    folder: Path
    timed: list[tuple[str, str, Timed]] = field(default_factory=list)
    contenders: dict[str, Contender] = field(default_factory=dict)
    inputs: dict[str, list[InputSpec]] = field(default_factory=dict)
    counted: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """FLOPs and bytes of one run of each."""
    failures: list[OptfuseError] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    _shared: list[torch.Tensor] | None = None

    def open_all(self, subjects: Sequence[Subject], stack: ExitStack, notify: Notify) -> None:
        """Open each; what cannot be opened is left out, with its reason."""
        for index, subject in enumerate(subjects):
            notify(f"Opening {subject.name}", None)
            try:
                self._open(subject, self.folder / str(index), stack)
            except UsageError:
                raise
            except OptfuseError as error:
                self.failures.append(error)
                self.not_run.append(NotRun(subject.name, error.cause))

    def _open(self, subject: Subject, folder: Path, stack: ExitStack) -> None:
        folder.mkdir()
        require_runnable(subject)
        thing = opened_by(subject, folder, self.batch)
        feeds = self._feeds(thing)
        timed = self._timed(subject, thing, feeds, folder, stack)
        self.timed.append((subject.engine, subject.name, timed))
        if len(self.timed) == 1:
            again = self._timed(subject, thing, feeds, folder, stack)
            self.timed.append((subject.engine, subject.name + CONTROL, again))
        self.inputs[subject.name] = _described(thing, feeds)
        self.counted[subject.name] = _counted(thing, feeds)
        self.contenders[subject.name] = Contender(
            name=subject.name,
            text=subject.text,
            kind=subject.kind,
            engine=subject.engine,
            version=backends.get(subject.engine).version(),
            sha256=thing.sha256 if isinstance(thing, Artifact) and subject.path else None,
        )

    def _feeds(self, thing: Program | Artifact) -> list[torch.Tensor]:
        """The same numbers for all that take the same inputs: the first subject's."""
        request = self.request
        feeds = feeds_of(thing, request.inputs, request.seed, self.batch)
        if self._shared is None:
            self._shared = feeds
        return self._shared if _alike(self._shared, feeds) else feeds

    def _timed(
        self,
        subject: Subject,
        thing: Program | Artifact,
        feeds: list[torch.Tensor],
        folder: Path,
        stack: ExitStack,
    ) -> Timed:
        request = self.request
        if request.isolated:
            torch.save(feeds, folder / "feeds.pt")
            artifact = thing if isinstance(thing, Artifact) else None
            job = Job(subject, artifact, self.batch, folder / "feeds.pt", request.threads)
            return stack.enter_context(Isolated(job))
        options = BuildOptions(threads=request.threads)
        session = stack.enter_context(backends.get(subject.engine).open(thing, options))
        session.bind(feeds)
        session.run()
        return InProcess(session)

    def run(self, notify: Notify) -> BatchRun:
        """Time all of them, and say what came of it."""
        request = self.request
        before = activity()
        measurements = interleave(
            self.timed, schedule=request.schedule, seed=request.seed, notify=notify
        )
        after = activity()
        first, control, *others = measurements
        versus = [Versus(each.variant, first.variant, self._ratio(first, each)) for each in others]
        caveats = diagnose(
            measurements,
            before,
            after,
            threads=request.threads,
            asked_devices=dict.fromkeys(backends.ON_GPU, "gpu"),
        )
        return BatchRun(
            batch=self.batch,
            inputs=self.inputs,
            measurements=[first, *others],
            work={name: Work(*counts) for name, counts in self.counted.items()},
            versus=versus,
            control=self._ratio(first, control),
            warnings=[self._named(caveat) for caveat in caveats],
            not_run=self.not_run,
        )

    def _ratio(self, first: Measurement, other: Measurement) -> stats.Ratio:
        return stats.paired_ratio(first.blocks, other.blocks, seed=self.request.seed)

    def _named(self, caveat: Caveat) -> Caveat:
        """About the subject, whose name says its engine already, and of which batch."""
        about = caveat.about
        for engine, name, _ in self.timed:
            about = about.replace(f"{engine} {name}", name)
        several = len(self.request.batches) > 1
        return replace(caveat, about=f"batch {self.batch}, {about}" if several else about)


def _alike(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    def kinds(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
        return [(tensor.shape, tensor.dtype) for tensor in tensors]

    return kinds(one) == kinds(other)


def _described(thing: Program | Artifact, feeds: Sequence[torch.Tensor]) -> list[InputSpec]:
    names = thing.input_names if isinstance(thing, Artifact) else ()
    return [
        InputSpec(
            names[index] if index < len(names) else None,
            tuple(feed.shape),
            str(feed.dtype).removeprefix("torch."),
        )
        for index, feed in enumerate(feeds)
    ]


def _counted(
    thing: Program | Artifact, feeds: Sequence[torch.Tensor]
) -> tuple[int | None, int | None]:
    """FLOPs of a run, and the bytes it has to move at least; None for what cannot be counted."""
    if isinstance(thing, Program):
        return cost.flops(thing), cost.compulsory_bytes(thing)
    if thing.kind != "onnx":
        return None, None
    shapes = dict(zip(thing.input_names, (tuple(feed.shape) for feed in feeds), strict=True))
    return (
        onnx_cost.flops_of(thing.path, shapes),
        onnx_cost.compulsory_bytes_of(thing.path, shapes),
    )


def _ceilings(opened: _Opened, run: BatchRun, request: BenchRequest, notify: Notify) -> Ceilings:
    """Of the device that the first subject runs on.

    Where a run surpasses those in the cache, they may come from a busy machine: they are then
    measured again, once.
    """
    notify("Measuring the machine's ceilings", None)
    device = "cpu" if opened.timed[0][2].device == "cpu" else "cuda"
    limits = ceilings(request.threads, device, request.cache)
    rates = [work.gflops_per_s or 0.0 for work in _with_shares(run, limits).work.values()]
    if max(rates) > limits.gflops_per_s:
        limits = ceilings(request.threads, device, request.cache, surpassed=True)
    return limits


def _with_shares(run: BatchRun, limits: Ceilings) -> BatchRun:
    """The run with what each achieved beside what the device of these ceilings can do."""
    found = {}
    for measurement in run.measurements:
        work = run.work[measurement.variant]
        counted = work.flops is not None and work.bytes is not None
        if counted and measurement.device == limits.device:
            median_ms = stats.summarise(measurement.samples_ms).median_ms
            reached = achieved(work.flops or 0, work.bytes or 0, median_ms, limits)
            work = replace(work, **asdict(reached))
        found[measurement.variant] = work
    return replace(run, work=found)


def _settings(request: BenchRequest) -> Mapping[str, Any]:
    schedule = request.schedule
    return {
        "threads": request.threads,
        "isolated": request.isolated,
        "seed": request.seed,
        "batches": list(request.batches),
        "duration_seconds": schedule.budget_seconds,
        "warmup_ms": schedule.warmup_ms,
        "blocks": [schedule.min_blocks, schedule.max_blocks],
    }
