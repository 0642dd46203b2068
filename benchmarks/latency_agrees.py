"""Whether optfuse's latency is what a plain loop around `session.run` gives, as a ratio.

    python -m benchmarks.latency_agrees [ROUNDS]

Exports GoogLeNet as it comes. Then every round starts two fresh processes. In one is a plain loop,
which is what onnxruntime's own performance test does: numpy and onnxruntime alone, one thread, and
a clock around `session.run`. In the other is optfuse's clock around its onnxruntime engine, on
one thread too. Both are warmed up, and then take turns of ten timed runs, so that a slow moment of
the machine hits both. Prints each round's medians in milliseconds, and the paired ratio over all
rounds, plain over ours, with its 95 % interval. They agree where 1 lies in it.

They are not quite the same. The plain loop gets its outputs as new arrays in every run, and its
thread pool may spin; optfuse binds inputs and outputs once and lets no pool spin. On one thread
neither is worth anything next to a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType

ROUNDS = 12
TURNS = 20
RUNS = 10
WARM_UP_SECONDS = 0.2

Block = Callable[[], Sequence[float]]
"""Times a turn, milliseconds of each run."""


def plain(path: str) -> Block:
    """A loop as anybody would write it, warmed up."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    feeds = {given.name: numpy.random.default_rng(0).normal(size=given.shape).astype("float32")}
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_UP_SECONDS:
        session.run(None, feeds)

    def block() -> list[float]:
        session.run(None, feeds)  # the other process had the caches
        samples_ms = []
        for _ in range(RUNS):
            start = time.perf_counter_ns()
            session.run(None, feeds)
            samples_ms.append((time.perf_counter_ns() - start) / 1e6)
        return samples_ms

    return block


def ours(path: str) -> Block:
    """What optfuse times, warmed up."""
    from optfuse import backends
    from optfuse.feeds import feeds_of
    from optfuse.files import sha256
    from optfuse.measure import InProcess, Schedule
    from optfuse.stages import Artifact, BuildOptions

    file = Path(path)
    artifact = Artifact(file, "onnx", sha256(file), file.stat().st_size)
    session = backends.get("onnxruntime").open(artifact, BuildOptions(threads=1))
    session.bind(feeds_of(artifact))
    timed = InProcess(session)
    timed.warm_up(Schedule(warmup_ms=1000 * WARM_UP_SECONDS))
    return lambda: timed.block(RUNS)


WAYS = {"plain": plain, "ours": ours}


class Running:
    """One way in a process of its own, warmed up and waiting for its turn."""

    def __init__(self, way: str, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.latency_agrees", way, str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def block(self) -> list[float]:
        """Milliseconds of every run of one turn."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        return self._answer()

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()  # closes its input, which ends it

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        samples_ms: list[float] = json.loads(self._process.stdout.readline())
        return samples_ms


def serve(block: Block) -> None:
    """In the process: say that it is warm, then time a turn for every line."""
    print("[]", flush=True)
    for _ in sys.stdin:
        print(json.dumps(list(block())), flush=True)


def exported(folder: Path) -> Path:
    """GoogLeNet as `torch.onnx.export` gives it."""
    from models import googlenet
    from optfuse.capture import capture
    from optfuse.export import export_baseline
    from optfuse.stages import LoadedModel

    module, examples = googlenet.build().eval(), tuple(googlenet.example_inputs())
    program = capture(LoadedModel("googlenet", module, examples))
    return export_baseline(program, folder / "baseline.onnx").path


def taken_in_turns(path: Path) -> list[list[float]]:
    """All samples of one round, of each way."""
    samples_ms: list[list[float]] = [[] for _ in WAYS]
    with Running("plain", path) as one, Running("ours", path) as other:
        pair = list(zip((one, other), samples_ms, strict=True))
        for turn in range(TURNS):
            for running, samples in pair if turn % 2 else reversed(pair):
                samples += running.block()
    return samples_ms


def main(rounds: int) -> None:
    """Print one line a round, and the ratio."""
    from optfuse.stats import paired_ratio

    print(f"{'round':>6}{'plain ms':>10}{'ours ms':>10}{'ratio':>8}")
    taken = []
    with tempfile.TemporaryDirectory() as name:
        path = exported(Path(name))
        for number in range(1, rounds + 1):
            taken.append(taken_in_turns(path))
            a, b = map(median, taken[-1])
            print(f"{number:>6}{a:>10.2f}{b:>10.2f}{a / b:>8.3f}", flush=True)
    plain, ours = zip(*taken, strict=True)
    a, b = (median(map(median, way)) for way in (plain, ours))
    ratio = paired_ratio(plain, ours, seed=0)
    interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
    verdict = "they agree" if ratio.low <= 1 <= ratio.high else "they do not agree"
    print(f"{'median':>6}{a:>10.2f}{b:>10.2f}{ratio.ratio:>8.3f} {interval}   {verdict}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        serve(WAYS[sys.argv[1]](sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
