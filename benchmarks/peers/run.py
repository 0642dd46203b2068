"""One network at one batch: every contender opened, compared with float64, and measured in one run.

    python -m benchmarks.peers.run NETWORK BATCH SECONDS

prints the row as one line of JSON, the last one of its output.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.kept import ROOT
from benchmarks.peers.contenders import ALL, ENGINES, REFERENCE, TOO_SLOW, Contender
from optfuse import backends, cost, stats
from optfuse.backends import Session
from optfuse.capture import capture
from optfuse.compare import drift
from optfuse.diagnose import diagnose
from optfuse.environment import activity
from optfuse.errors import OptfuseError
from optfuse.export import export_baseline
from optfuse.files import cache_folder, sha256
from optfuse.float64 import run_float64, torch_threads
from optfuse.graph import flat_inputs
from optfuse.load import load
from optfuse.lower import lower
from optfuse.measure import Schedule, measure
from optfuse.optimize import optimize, select
from optfuse.precision.lowered import Lowered
from optfuse.precision.plan import Plan, Precision
from optfuse.roofline import achieved, ceilings
from optfuse.stages import Artifact, BuildOptions, InputSpec, Measurement, Program, Source

THREADS = 1
SEED = 0
CALIBRATION_SAMPLES = 8
CONTROL = "the reference again"

Row = dict[str, Any]


def run(network: str, batch: int, seconds: float, among: Sequence[Contender] = ALL) -> Row:
    """What every contender came to on one network.

    Args:
        network: a module of `models/`.
        batch: images at once.
        seconds: how long is measured in all.
        among: who is compared; the reference is always there.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="optfuse-") as folder, ExitStack() as stack:
        stack.enter_context(torch_threads(THREADS))
        made = _Made(network, batch, Path(folder))
        opened: dict[str, Session] = {}
        missing: dict[str, str] = {}
        drifts: dict[str, Any] = {}
        for contender in dict.fromkeys((REFERENCE, *among)):
            try:
                session = stack.enter_context(made.session(contender))
                if contender != REFERENCE:
                    _require_comparable(session, opened[REFERENCE.name])
                drifts[contender.name] = drift(
                    session.fetch(),
                    made.reference,
                    engine=contender.engine,
                    variant=contender.name,
                    reference_name="captured program in float64",
                )
                opened[contender.name] = session
            except (OptfuseError, ImportError) as error:
                missing[contender.name] = _reason(error)
        opened[CONTROL] = stack.enter_context(made.session(REFERENCE))
        before = activity()
        measured = measure(
            # Told apart by what made it and the engine, and by the precision.
            [(*_parted(name), session) for name, session in opened.items()],
            schedule=Schedule(budget_seconds=seconds),
            seed=SEED,
        )
        caveats = diagnose(measured, before, activity(), threads=THREADS, asked_devices={})
    by_name = {f"{each.engine} {each.variant}": each for each in measured}
    control = stats.paired_ratio(by_name[REFERENCE.name].blocks, by_name[CONTROL].blocks, seed=SEED)
    floor = stats.noise_floor(control)
    limits = ceilings(THREADS, "cpu", cache_folder())
    in_float32 = [each for each in opened if each.endswith(" fp32")]
    quickest_ms = min(_median(by_name[each]) for each in in_float32)
    if made.flops / quickest_ms / 1e6 > limits.gflops_per_s:
        # Those in the cache may come from a busy machine.
        limits = ceilings(THREADS, "cpu", cache_folder(), surpassed=True)

    def row(contender: Contender) -> Row:
        named = {"by": contender.by, "engine": contender.engine, "precision": contender.precision}
        if contender.name in missing:
            return {**named, "missing": missing[contender.name]}
        return {
            **named,
            **_figures(by_name, contender.name, floor),
            "relative_l2": drifts[contender.name].relative_l2,
            "top1": drifts[contender.name].top1_agreement,
            "share": achieved(
                made.flops, made.moved_bytes, _median(by_name[contender.name]), limits
            ).share,
        }

    return {
        "outcome": "measured",
        "noise_floor": floor,
        "caveats": [f"{each.about}: {each.finding}." for each in caveats],
        "contenders": [row(each) for each in dict.fromkeys((REFERENCE, *among))],
        "seconds": time.perf_counter() - begun,
    }


def _figures(by_name: Mapping[str, Measurement], name: str, floor: float) -> Row:
    ratio = stats.paired_ratio(by_name[REFERENCE.name].blocks, by_name[name].blocks, seed=SEED)
    return {
        "median_ms": _median(by_name[name]),
        "ratio": [ratio.ratio, ratio.low, ratio.high],
        "verdict": "reference" if name == REFERENCE.name else stats.verdict(ratio, floor),
    }


def _require_comparable(session: Session, reference: Session) -> None:
    """Refuse what is so slow that it would take most of the time that all of them have."""
    times_as_long = _seconds(session) / _seconds(reference)
    if times_as_long > TOO_SLOW:
        raise OptfuseError(
            "It was left out of the measurement",
            f"a run takes about {times_as_long:.0f} times as long as the reference's",
            "",
        )


def _seconds(session: Session) -> float:
    """Of one run; it has run before."""
    begun = time.perf_counter()
    session.run()
    return time.perf_counter() - begun


def _parted(name: str) -> tuple[str, str]:
    by, _, precision = name.rpartition(" ")
    return by, precision


def _median(measurement: Measurement) -> float:
    return stats.summarise(measurement.samples_ms).median_ms


def _reason(error: Exception) -> str:
    if isinstance(error, OptfuseError):
        return error.cause.rstrip(".")
    return f"{error}: pip install 'optfuse[bench]'"


class _Made:
    """The programs and files of one network at one batch, each made once and when it is needed."""

    def __init__(self, network: str, batch: int, folder: Path) -> None:
        module = f"{ROOT / 'models' / network}.py:build"
        shape = tuple(load(Source(module)).example_args[0].shape[1:])
        source = Source(module, inputs=(InputSpec(None, (batch, *shape)),), seed=SEED)
        self._folder = folder
        self._captured = capture(load(source))
        self._optimized = optimize(self._captured, select("all"), seed=SEED)
        inputs = flat_inputs(self._captured.graph_module, self._captured.example_args, {})
        self._feeds: list[torch.Tensor] = list(inputs)
        generator = torch.Generator().manual_seed(SEED + 1)
        self._samples = [
            [torch.randn(feed.shape, generator=generator) for feed in self._feeds]
            for _ in range(CALIBRATION_SAMPLES)
        ]
        self._lowered: dict[str, Lowered] = {}
        self._simplified: dict[str, Artifact] = {}
        self._baseline = export_baseline(self._captured, folder / "baseline.onnx")
        self.reference = [
            leaf
            for leaf in run_float64(self._captured.graph_module, self._captured.example_args, {})
            if isinstance(leaf, torch.Tensor)
        ]
        self.flops = cost.flops(self._captured)
        self.moved_bytes = cost.compulsory_bytes(self._captured)

    def session(self, contender: Contender) -> Session:
        """A session of this contender, which has run once on the network's inputs.

        Raises:
            OptfuseError: the engine is missing, or cannot run in this precision.
            ImportError: a simplifier is missing.
        """
        backend = backends.get(contender.engine)
        refused = backend.unavailable() or backend.refuses(contender.precision)
        if refused:
            raise OptfuseError(f"{contender.name} is not here", refused, "")
        options = BuildOptions(threads=THREADS, cache=cache_folder())
        thing = self._thing(contender, program=backend.consumes == "program")
        session = backend.open(thing, options)
        session.bind(self._feeds)
        session.run()
        return session

    def _thing(self, contender: Contender, *, program: bool) -> Program | Artifact:
        if contender.by in _SIMPLIFIERS:
            return self._simplify(contender.by)
        if contender.by != "optfuse":
            return self._captured if program else self._baseline
        lowered = self._lower(contender.precision)
        if not program:
            return lowered.file_for(contender.engine)
        assert lowered.program is not None  # or the engine had refused the precision
        return lowered.program

    def _lower(self, precision: str) -> Lowered:
        if precision not in self._lowered:
            self._lowered[precision] = lower(
                self._optimized,
                Plan(cast(Precision, precision), calibration=self._samples, drawn=True),
                self._folder / precision / "model.onnx",
                engines=ENGINES,
                input_names=self._baseline.input_names,
                output_names=self._baseline.output_names,
            )
        return self._lowered[precision]

    def _simplify(self, by: str) -> Artifact:
        if by not in self._simplified:
            path = self._folder / f"{by}.onnx"
            _SIMPLIFIERS[by](self._baseline.path, path)
            self._simplified[by] = Artifact(path, "onnx", sha256(path), path.stat().st_size)
        return self._simplified[by]


def _onnxsim(before: Path, after: Path) -> None:
    import onnx
    import onnxsim

    simplified, same = onnxsim.simplify(onnx.load(before))
    if not same:
        raise OptfuseError("onnxsim changed the model", "Its own check failed", "Leave it out")
    onnx.save(simplified, after)


def _onnxslim(before: Path, after: Path) -> None:
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(before)), after)


_SIMPLIFIERS: dict[str, Callable[[Path, Path], None]] = {"onnxsim": _onnxsim, "onnxslim": _onnxslim}


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    name, size, duration = sys.argv[1:]
    print("\n" + json.dumps(run(name, int(size), float(duration))))
