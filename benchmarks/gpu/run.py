"""One network on the engines that are here: drift and latency, before the passes and after them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import ROOT
from optfuse import backends, stats
from optfuse.backends import Backend, Session
from optfuse.capture import capture
from optfuse.compare import drift
from optfuse.errors import OptfuseError
from optfuse.export import export, export_baseline
from optfuse.files import cache_folder
from optfuse.float64 import run_float64
from optfuse.load import load
from optfuse.measure import Schedule, measure
from optfuse.optimize import optimize, select
from optfuse.stages import Artifact, BuildOptions, Drift, Measurement, Program, Source

NETWORKS = tuple(
    path.stem for path in sorted((ROOT / "models").glob("*.py")) if not path.stem.startswith("_")
)

DRIFT_LIMIT = 1e-4
RATIO_LIMIT = 10.0
"""A network is wrong where ours is farther than both from float64: relative L2, and as a multiple
of the export's own distance. The zoo's limits."""

VARIANTS = ("baseline", "control", "optimized")
SEED = 0

Row = dict[str, Any]


@dataclass(frozen=True)
class Skipped:
    """An engine that was left out, and why."""

    engine: str
    reason: str


def usable(names: Sequence[str]) -> tuple[list[str], list[Skipped]]:
    """Those of the engines that can run here, and why the others cannot."""
    here, skipped = [], []
    for name in names:
        backend = backends.get(name)
        reason = backend.unavailable() or backend.cannot_run()
        if reason is None:
            here.append(name)
        else:
            skipped.append(Skipped(name, reason))
    return here, skipped


class Prepared:
    """A network, captured and optimized once for all engines.

    Args:
        network: a module of `models/`.
        folder: for files that are made on the way.
        threads: of what runs on the CPU.
    """

    def __init__(self, network: str, folder: Path, threads: int) -> None:
        self.network = network
        self._folder = folder
        self._threads = threads
        source = Source(f"{ROOT / 'models' / network}.py:build", seed=SEED)
        self._captured = capture(load(source))
        self._optimized = optimize(self._captured, select("all"), seed=SEED)
        self._feeds = list(self._captured.example_args)
        outputs = run_float64(self._captured.graph_module, self._captured.example_args, {})
        self._reference = [each for each in outputs if isinstance(each, torch.Tensor)]
        self._files: dict[str, Artifact] = {}

    def rows(self, engines: Sequence[str], seconds: float, eager: str) -> Iterator[Row]:
        """A row for each engine, from one interleaved run of all of them.

        Args:
            engines: names; one that fails has a row that says so.
            seconds: how long is measured in all.
            eager: the engine whose baseline all are compared with, as people would run the model
                otherwise; it is opened beside the others.
        """
        opened: list[tuple[str, str, Session]] = []
        failed: dict[str, str] = {}
        drifts: dict[tuple[str, str], Drift] = {}
        with ExitStack() as stack:
            for engine in dict.fromkeys((eager, *engines)):
                try:
                    with ExitStack() as attempt:
                        sessions = [
                            (engine, variant, attempt.enter_context(self._session(engine, variant)))
                            for variant in VARIANTS
                        ]
                        stack.push(attempt.pop_all())
                except OptfuseError as error:
                    failed[engine] = error.cause
                    continue
                opened += sessions
                for _, variant, session in sessions:
                    drifts[engine, variant] = drift(
                        session.fetch(),
                        self._reference,
                        engine=engine,
                        variant=variant,
                        reference_name="captured program in float64",
                    )
            measured = self._measured(opened, seconds)
        for engine in engines:
            if engine in failed:
                yield {"network": self.network, "engine": engine, "failed": failed[engine]}
            else:
                yield self._row(engine, eager, measured, drifts)

    def _measured(
        self, opened: Sequence[tuple[str, str, Session]], seconds: float
    ) -> dict[tuple[str, str], Measurement]:
        if not opened:
            return {}
        measured = measure(opened, schedule=Schedule(budget_seconds=seconds), seed=SEED)
        return {(each.engine, each.variant): each for each in measured}

    def _row(
        self,
        engine: str,
        eager: str,
        measured: dict[tuple[str, str], Measurement],
        drifts: dict[tuple[str, str], Drift],
    ) -> Row:
        blocks = {key: each.blocks for key, each in measured.items()}
        floor = stats.noise_floor(
            stats.paired_ratio(blocks[engine, "baseline"], blocks[engine, "control"], seed=SEED)
        )
        ours = stats.paired_ratio(
            blocks[engine, "baseline"], blocks[engine, "optimized"], seed=SEED
        )
        against_eager = None
        if (eager, "baseline") in blocks:
            ratio = stats.paired_ratio(
                blocks[eager, "baseline"], blocks[engine, "optimized"], seed=SEED
            )
            against_eager = [ratio.ratio, ratio.low, ratio.high]
        before, after = (drifts[engine, variant] for variant in ("baseline", "optimized"))
        times = after.relative_l2 / before.relative_l2 if before.relative_l2 else None
        far = after.relative_l2 > DRIFT_LIMIT and (times is None or times > RATIO_LIMIT)
        return {
            "network": self.network,
            "engine": engine,
            "device": measured[engine, "optimized"].device,
            "before_ms": _median(measured[engine, "baseline"]),
            "after_ms": _median(measured[engine, "optimized"]),
            "ratio": [ours.ratio, ours.low, ours.high],
            "noise_floor": floor,
            "verdict": stats.verdict(ours, floor),
            "against_eager": against_eager,
            "drift": [before.relative_l2, after.relative_l2],
            "wrong": bool(far or after.nonfinite),
        }

    def _session(self, engine: str, variant: str) -> Session:
        backend = backends.get(engine)
        options = BuildOptions(threads=self._threads, cache=cache_folder())
        program: Program | Artifact
        if backend.consumes == "program":
            program = self._captured if variant == "baseline" else self._optimized
        else:
            program = self._file("optimized" if variant == "optimized" else "baseline")
            if backend.builds:
                program = self._built(backend, program, options)
        session = backend.open(program, options)
        try:
            session.bind(self._feeds)
            session.run()
        except OptfuseError:
            session.__exit__(None, None, None)
            raise
        return session

    def _built(self, backend: Backend, onnx: Artifact, options: BuildOptions) -> Artifact:
        key = f"{backend.name} {onnx.variant}"
        if key not in self._files:
            folder = self._folder / "engines" / backend.name
            ((engine, _report),) = backend.build(onnx, options, folder)
            self._files[key] = engine
        return self._files[key]

    def _file(self, variant: str) -> Artifact:
        if variant not in self._files:
            path = self._folder / f"{variant}.onnx"
            if variant == "baseline":
                self._files[variant] = export_baseline(self._captured, path)
            else:
                baseline = self._file("baseline")
                self._files[variant] = export(
                    self._optimized,
                    path,
                    input_names=baseline.input_names,
                    output_names=baseline.output_names,
                )
        return self._files[variant]


def _median(measurement: Measurement) -> float:
    return stats.summarise(measurement.samples_ms).median_ms


def prove(
    networks: Sequence[str],
    rounds: Sequence[Sequence[str]],
    eager: str,
    seconds_each: float,
    threads: int,
) -> Iterator[Row]:
    """Rows of all networks: first on the engines of the first round, then on those of the next.

    Engines that take long to open come in a later round, so that little is lost when the time is
    up.
    """
    with tempfile.TemporaryDirectory(prefix="optfuse-") as folder, torch.no_grad():
        torch.set_num_threads(threads)
        prepared: dict[str, Prepared] = {}
        for engines in rounds:
            for network in networks if engines else ():
                try:
                    if network not in prepared:
                        prepared[network] = Prepared(network, Path(folder) / network, threads)
                    yield from prepared[network].rows(engines, seconds_each, eager)
                except OptfuseError as error:
                    for engine in engines:
                        yield {"network": network, "engine": engine, "failed": error.cause}
