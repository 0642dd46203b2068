"""What each pass earned on each engine: one after the other, every pass alone, every pass left out.

    up_to X      X and all before it: where the time went, step by step
    alone X      X and no other pass: what it brings by itself
    without X    all but X: what is lost without it

Passes work together. Folding a batch norm lets an activation be fused, so neither `alone` nor
`without` tells everything, and the gains of `alone` do not multiply to the whole.

Each choice of passes is optimised, proved and exported as `optimize` does it, and timed against the
export as it comes on the same engine, in one interleaved run. Choices that give the same thing (a
pass that matched nothing, say) are timed once. There are at most 3n - 2 different choices of n
passes, 19 of seven.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from optfuse import fingerprint, stats
from optfuse.backends import Backend
from optfuse.compare import drift
from optfuse.environment import environment
from optfuse.errors import EngineError
from optfuse.export import data_file, export
from optfuse.graph import constant_of, operators
from optfuse.measure import Schedule, measure
from optfuse.optimize import optimize
from optfuse.passes import Pass
from optfuse.report.schema import Ablated
from optfuse.stages import Artifact, BuildOptions, Drift, Measurement, Notify, Program, silent

How = Literal["alone", "without", "up_to"]

SECONDS_EACH = 2.5
"""As much as each of three variants on two engines gets in a run of 15 s. It is enough for the
schedule's 40 blocks of three runs at 13 ms a run, and for a dozen at 50 ms."""

MEMORY_SHARE = 0.5
"""Of the machine's memory, what the open sessions of a run may take."""

SESSION_BYTES = 3
"""What a session takes for each byte of its file: the weights, often a second time in the order
that the engine's kernels want, and room for activations."""


@dataclass(frozen=True)
class Ablation:
    """What each pass earned.

    Attributes:
        rows: for each engine in turn, all `up_to`, all `alone` and all `without`.
        skipped: engine without rows -> why, as a user understands it.
        failures: of engines that failed on the way.
    """

    rows: tuple[Ablated, ...]
    skipped: Mapping[str, str]
    failures: tuple[EngineError, ...]


@dataclass(frozen=True)
class Choice:
    """Some of the passes: which pass it is about, and how; `alone elide_concat` as text."""

    how: How
    name: str
    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return f"{self.how} {self.name}"


def choices(selected: Sequence[Pass]) -> list[Choice]:
    """Every choice that gets a row, in the rows' order."""
    every = tuple(selected)
    places = range(len(every))
    return [
        *(Choice("up_to", every[at].name, every[: at + 1]) for at in places),
        *(Choice("alone", each.name, (each,)) for each in every),
        *(Choice("without", every[at].name, every[:at] + every[at + 1 :]) for at in places),
    ]


def ablate(
    captured: Program,
    selected: Sequence[Pass],
    engines: Sequence[Backend],
    *,
    baseline: Artifact,
    feeds: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None,
    reference_name: str,
    options: BuildOptions,
    folder: Path,
    seconds_each: float = SECONDS_EACH,
    seed: int = 0,
    notify: Notify = silent,
) -> Ablation:
    """Measure what each pass earned, latency and drift both.

    On each engine, the export as it comes, the same once more as a control, and every variant are
    interleaved in one run. Where so many sessions do not fit into half of the memory, the variants
    are spread over several runs, each with an export as it comes and a control of its own.

    Args:
        captured: what capture gave.
        selected: the passes, in the order they run.
        engines: what runs the variants; one that cannot run here is skipped.
        baseline: the ONNX file of the export as it comes.
        feeds: the inputs, in the program's order.
        reference: outputs that drift is taken from, or None to take none.
        reference_name: what the reference is.
        options: how an engine is opened; one with a build step builds for the device that is here.
        folder: for the variants' files, up to three for each pass, which are left there.
        seconds_each: how long each variant is measured on each engine, warm-up included.
        seed: of the proofs, of the order of the runs and of the intervals.
        notify: told what is going on.

    Raises:
        ModelError: a choice of passes cannot be proved or exported.
        OutputError: a file cannot be written.
    """
    every = choices(selected)
    optimized = _optimized(captured, every, seed, notify)
    run = _Run(feeds, reference, reference_name, options, seconds_each, seed, notify)
    files: _Variants | None = None
    rows: list[Ablated] = []
    skipped: dict[str, str] = {}
    failures: list[EngineError] = []
    for backend in engines:
        if missing := backend.cannot_run():
            skipped[backend.name] = missing
            continue
        if backend.consumes == "program":
            variants = _programs(captured, optimized)
        else:
            variants = files = files or _files(baseline, optimized, folder, notify)
        try:
            found = run.of(backend, variants, folder / backend.name)
        except EngineError as error:
            failures.append(error)
            skipped[backend.name] = f"it failed: {error.cause}"
            continue
        rows += [_row(backend, each, optimized[str(each)], variants, found) for each in every]
    return Ablation(tuple(rows), skipped, tuple(failures))


@dataclass(frozen=True)
class _Optimized:
    """What a choice of passes made of the program, and how that can be told from others."""

    program: Program
    fingerprint: str


def _optimized(
    captured: Program, every: Sequence[Choice], seed: int, notify: Notify
) -> dict[str, _Optimized]:
    """What each choice gives, by its text; equal constants lie in memory once."""
    done: dict[tuple[Pass, ...], _Optimized] = {}
    pool: dict[str, torch.nn.Parameter] = {}
    for number, choice in enumerate(every):
        if choice.passes not in done:
            notify(f"Optimizing {choice}", number / len(every))
            program = optimize(captured, choice.passes, seed=seed)
            _share_constants(program, pool)
            done[choice.passes] = _Optimized(program, fingerprint.of_program(program))
    return {str(choice): done[choice.passes] for choice in every}


def _share_constants(program: Program, pool: dict[str, torch.nn.Parameter]) -> None:
    """Take those constants out of the pool that are there, and put the others into it."""
    for node in program.graph_module.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        holder = program.graph_module.get_submodule(owner)
        found = getattr(holder, name)
        if isinstance(found, torch.nn.Parameter) and constant_of(node) is not None:
            setattr(holder, name, pool.setdefault(fingerprint.of_tensor(found), found))


@dataclass(frozen=True)
class _Variants:
    """What an engine runs.

    Attributes:
        things: `baseline`, and for everything else that differs the first choice that gives it.
        of: a choice's text -> which of the things it gives.
    """

    things: Mapping[str, Program | Artifact]
    of: Mapping[str, str]


def _programs(captured: Program, optimized: Mapping[str, _Optimized]) -> _Variants:
    """For an engine that runs programs."""
    names = {fingerprint.of_program(captured): "baseline"}
    things: dict[str, Program | Artifact] = {"baseline": captured}
    for choice, each in optimized.items():
        if names.setdefault(each.fingerprint, choice) == choice:
            things[choice] = each.program
    return _Variants(
        things, {choice: names[each.fingerprint] for choice, each in optimized.items()}
    )


def _files(
    baseline: Artifact, optimized: Mapping[str, _Optimized], folder: Path, notify: Notify
) -> _Variants:
    """For an engine that reads ONNX: programs that differ can still give the same file."""
    names = {fingerprint.of_onnx(baseline.path): "baseline"}
    things: dict[str, Program | Artifact] = {"baseline": baseline}
    given: dict[str, str] = {}
    for number, (choice, each) in enumerate(optimized.items()):
        if each.fingerprint in given:
            continue
        notify(f"Exporting {choice}", number / len(optimized))
        artifact = export(
            each.program,
            folder / f"{choice.replace(' ', '-')}.onnx",
            input_names=baseline.input_names,
            output_names=baseline.output_names,
        )
        name = names.setdefault(fingerprint.of_onnx(artifact.path), choice)
        given[each.fingerprint] = name
        if name == choice:
            things[choice] = artifact
        else:
            for path in (artifact.path, data_file(artifact.path)):
                path.unlink(missing_ok=True)
    return _Variants(
        things, {choice: given[each.fingerprint] for choice, each in optimized.items()}
    )


@dataclass(frozen=True)
class _Found:
    """What was seen of one variant."""

    measurement: Measurement
    ratio: stats.Ratio
    noise_floor: float
    drift: Drift | None


@dataclass(frozen=True)
class _Run:
    """How variants are opened, compared and measured; as `ablate` has it."""

    feeds: Sequence[torch.Tensor]
    reference: Sequence[torch.Tensor] | None
    reference_name: str
    options: BuildOptions
    seconds_each: float
    seed: int
    notify: Notify

    def of(self, backend: Backend, variants: _Variants, folder: Path) -> dict[str, _Found]:
        """Every variant on one engine, by its name.

        Raises:
            EngineError: the engine failed with one of them.
        """
        things = variants.things
        if backend.builds:
            things = {name: self._built(backend, things[name], folder / name) for name in things}
        found: dict[str, _Found] = {}
        for group in _groups(things):
            found.update(self._interleaved(backend, group))
        return found

    def _built(self, backend: Backend, thing: Program | Artifact, folder: Path) -> Artifact:
        """An engine for the device that is here."""
        assert isinstance(thing, Artifact)
        self.notify(f"Building {backend.name} from {thing.path.name}", None)
        [(engine, _), *_] = backend.build(thing, replace(self.options, targets=()), folder)
        return engine

    def _interleaved(
        self, backend: Backend, group: Mapping[str, Program | Artifact]
    ) -> dict[str, _Found]:
        """The variants of a group, in one run with the export as it comes and its control."""
        drifts: dict[str, Drift] = {}
        with ExitStack() as stack:
            sessions = []
            again = {"baseline": group["baseline"], "control": group["baseline"]}
            for name, thing in {**again, **group}.items():
                self.notify(f"Opening {backend.name} {name}", None)
                session = stack.enter_context(backend.open(thing, self.options))
                session.bind(self.feeds)
                session.run()
                sessions.append((backend.name, name, session))
                if self.reference is not None:
                    drifts[name] = drift(
                        session.fetch(),
                        self.reference,
                        engine=backend.name,
                        variant=name,
                        reference_name=self.reference_name,
                    )
            schedule = Schedule(budget_seconds=self.seconds_each * len(sessions))
            measured = measure(sessions, schedule=schedule, seed=self.seed, notify=self.notify)
        baseline, control, *_ = measured
        floor = stats.noise_floor(self._ratio(baseline, control))
        return {
            each.variant: _Found(each, self._ratio(baseline, each), floor, drifts.get(each.variant))
            for each in measured
        }

    def _ratio(self, baseline: Measurement, other: Measurement) -> stats.Ratio:
        return stats.paired_ratio(baseline.blocks, other.blocks, seed=self.seed)


def _groups(
    things: Mapping[str, Program | Artifact],
) -> Iterator[dict[str, Program | Artifact]]:
    """The variants in as few groups as fit into memory, the baseline first in each."""
    machine = environment(1)
    sizes = [machine["memory_bytes"], (machine["gpu"] or {}).get("memory_bytes")]
    room = MEMORY_SHARE * min((size for size in sizes if size is not None), default=math.inf)
    # Programs take nothing: they share their constants.
    files = [thing.size_bytes for thing in things.values() if isinstance(thing, Artifact)]
    fit = room / (SESSION_BYTES * max(files)) if files else math.inf
    names = [name for name in things if name != "baseline"]
    # Two places are the baseline's and the control's; there is always one more.
    at_once = max(1, int(min(fit - 2, len(names))))
    for start in range(0, max(1, len(names)), at_once):
        yield {name: things[name] for name in ("baseline", *names[start : start + at_once])}


def _row(
    backend: Backend,
    choice: Choice,
    optimized: _Optimized,
    variants: _Variants,
    found: Mapping[str, _Found],
) -> Ablated:
    name = variants.of[str(choice)]
    seen = found[name]
    return Ablated(
        engine=backend.name,
        how=choice.how,
        name=choice.name,
        passes=tuple(str(each) for each in choice.passes),
        operators=sum(operators(optimized.program.graph_module).values()),
        same_as=None if name == str(choice) else name,
        measurement=seen.measurement,
        ratio=seen.ratio,
        noise_floor=seen.noise_floor,
        drift=seen.drift,
    )
