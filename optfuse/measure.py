"""Session -> Measurement. The only clock of latency in the project.

All variants are timed in one process, in randomised interleaved blocks: whatever slows the machine
down for a while (another process, a lower clock frequency, heat) then hits every variant alike, and
block i of one can be paired with block i of another.

One clock for every engine, `time.perf_counter_ns` on the host around `Session.run`. On a CUDA
device too: a session's `run` returns only when the device has finished, so the host clock sees
what a caller waits for, launch overhead included.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Protocol

from optfuse.stages import Measurement, Notify, silent

if TYPE_CHECKING:
    from optfuse.backends import Session

Clock = Callable[[], int]
"""Nanoseconds since some fixed moment."""

NANOSECONDS_PER_MS = 1e6


@dataclass(frozen=True)
class Schedule:
    """How much is measured.

    Attributes:
        budget_seconds: for all sessions together, warm-up included. No round is begun that would
            end after it, once there are `min_blocks`.
        min_blocks: rounds that are run whatever they cost; the interval on a ratio needs them.
        max_blocks: rounds after which more samples would not make the interval worth the wait.
        block_ms: a block has enough runs to last about this long.
        min_runs_per_block: and at least so many, or as many as let `min_blocks` rounds fit into
            the budget; with three, a block's median survives one interrupted run.
        warmup_ms, warmup_runs: both must be reached before a session is timed. 200 ms is what
            trtexec does.
        fill: blocks are as long as the budget lets `max_blocks` of them be, whatever `block_ms`.
    """

    budget_seconds: float = 15.0
    min_blocks: int = 10
    max_blocks: int = 40
    block_ms: float = 30.0
    min_runs_per_block: int = 3
    warmup_ms: float = 200.0
    warmup_runs: int = 3
    fill: bool = False

    @classmethod
    def lasting(
        cls, seconds: float, *, warmup_ms: float = 200.0, blocks: int | None = None
    ) -> Schedule:
        """A schedule for so many seconds in all; with `blocks`, of just so many rounds, each of
        which is made long enough to fill that time."""
        if blocks is None:
            return cls(budget_seconds=seconds, warmup_ms=warmup_ms)
        return cls(seconds, blocks, blocks, warmup_ms=warmup_ms, fill=True)

    def __post_init__(self) -> None:
        if not 1 <= self.min_blocks <= self.max_blocks:
            raise ValueError("a schedule needs 1 <= min_blocks <= max_blocks")
        if self.min_runs_per_block < 1 or self.warmup_runs < 1:
            raise ValueError("a schedule needs at least one run a block and one of warm-up")


class Timed(Protocol):
    """Something that runs and can be timed, here or in a process of its own."""

    device: str

    def warm_up(self, schedule: Schedule) -> float:
        """Run until warm; milliseconds of a run."""

    def block(self, runs: int) -> tuple[float, ...]:
        """Run once without timing, then time so many runs one by one; milliseconds of each."""


class InProcess:
    """A session of this process.

    Args:
        session: its inputs are already bound.
        clock: for tests.
    """

    def __init__(self, session: Session, clock: Clock = time.perf_counter_ns) -> None:
        self.device = session.device
        self._session = session
        self._clock = clock

    def warm_up(self, schedule: Schedule) -> float:
        """Run until warm; milliseconds of a run, from the later half of them."""
        runs_ms: list[float] = []
        while len(runs_ms) < schedule.warmup_runs or sum(runs_ms) < schedule.warmup_ms:
            start = self._clock()
            self._session.run()
            # A run below the clock's resolution still counts, or this loop would never end.
            runs_ms.append(max(1, self._clock() - start) / NANOSECONDS_PER_MS)
        return median(runs_ms[len(runs_ms) // 2 :])

    def block(self, runs: int) -> tuple[float, ...]:
        """Milliseconds of every run of one block; its first run is not timed."""
        run, clock = self._session.run, self._clock
        run()
        samples_ms = []
        for _ in range(runs):
            start = clock()
            run()
            samples_ms.append(max(1, clock() - start) / NANOSECONDS_PER_MS)
        return tuple(samples_ms)


def measure(
    sessions: Sequence[tuple[str, str, Session]],
    *,
    schedule: Schedule | None = None,
    seed: int = 0,
    notify: Notify = silent,
    clock: Clock = time.perf_counter_ns,
) -> list[Measurement]:
    """Time sessions against each other.

    Each is warmed up, then every round runs one block of each in an order shuffled anew. A block
    begins with one run that is not timed, because the caches and thread pools are still the
    previous variant's; the rest are timed one by one. Python's garbage collector is off meanwhile.

    With the default schedule GoogLeNet at 40 ms a run on five sessions takes about 15 s: 17 rounds
    of three timed runs.

    Args:
        sessions: (engine, variant, session) of each; the inputs are already bound.
        schedule: how much is measured; the default `Schedule()` where None.
        seed: of the order within the rounds.
        notify: told how far it is.
        clock: for tests.

    Returns:
        One measurement a session, in the order given, all with the same number of blocks.

    Raises:
        ValueError: there is no session, or two have the same engine and variant.
        EngineError: an engine failed while it ran.
    """
    timed = [(engine, variant, InProcess(each, clock)) for engine, variant, each in sessions]
    return interleave(timed, schedule=schedule, seed=seed, notify=notify, clock=clock)


def interleave(
    timed: Sequence[tuple[str, str, Timed]],
    *,
    schedule: Schedule | None = None,
    seed: int = 0,
    notify: Notify = silent,
    clock: Clock = time.perf_counter_ns,
) -> list[Measurement]:
    """What `measure` does, with anything that can be timed: (engine, variant, timed) of each.

    Raises:
        ValueError: there is none, or two have the same engine and variant.
        EngineError: an engine failed while it ran.
    """
    _check_distinct([(engine, variant) for engine, variant, _ in timed])
    schedule = schedule or Schedule()
    deadline = clock() + int(schedule.budget_seconds * 1e9)
    with no_garbage_collection():
        run_ms = []
        for engine, variant, each in timed:
            notify(f"Warming up {engine} {variant}", None)
            run_ms.append(each.warm_up(schedule))
        left_ms = (deadline - clock()) / NANOSECONDS_PER_MS
        runs = _runs_per_block(run_ms, schedule, left_ms)
        contenders = [(each, count) for (_, _, each), count in zip(timed, runs, strict=True)]
        blocks = _rounds(contenders, schedule, deadline, random.Random(seed), notify, clock)
    return [
        Measurement(engine, variant, each.device, tuple(of_one))
        for (engine, variant, each), of_one in zip(timed, blocks, strict=True)
    ]


def _runs_per_block(run_ms: Sequence[float], schedule: Schedule, left_ms: float) -> list[int]:
    """Timed runs in a block of each session, from how long one of its runs takes.

    Slow models get fewer runs rather than fewer blocks: it is blocks that an interval is made of.
    """
    block_ms = schedule.block_ms
    if schedule.fill:  # less the run of each block that is not timed
        block_ms = (left_ms / schedule.max_blocks - sum(run_ms)) / len(run_ms)
    for least in range(schedule.min_runs_per_block, 0, -1):
        runs = [max(least, math.ceil(block_ms / each)) for each in run_ms]
        round_ms = sum((count + 1) * each for count, each in zip(runs, run_ms, strict=True))
        if round_ms * schedule.min_blocks <= left_ms:
            break
    return runs


def _rounds(
    contenders: Sequence[tuple[Timed, int]],
    schedule: Schedule,
    deadline: int,
    shuffler: random.Random,
    notify: Notify,
    clock: Clock,
) -> list[list[tuple[float, ...]]]:
    """Blocks of every contender: one each a round, until time or rounds are up."""
    blocks: list[list[tuple[float, ...]]] = [[] for _ in contenders]
    begun = clock()
    for done in range(schedule.max_blocks):
        elapsed = clock() - begun
        expected_end = begun + elapsed * (done + 1) / max(done, 1)
        if done >= schedule.min_blocks and expected_end > deadline:
            break
        # Whichever limit ends it: the rounds, or the time once there are enough of them.
        of_time = min(elapsed / max(deadline - begun, 1), done / schedule.min_blocks)
        notify(f"Measuring latency, round {done + 1}", max(done / schedule.max_blocks, of_time))
        order = list(range(len(contenders)))
        shuffler.shuffle(order)
        for index in order:
            timed, runs = contenders[index]
            blocks[index].append(timed.block(runs))
    notify("Measured latency", 1.0)
    return blocks


def _check_distinct(names: Sequence[tuple[str, str]]) -> None:
    if not names:
        raise ValueError("there is no session to measure")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name[0]} {name[1]} is there twice")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a run would be counted as the engine's time."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
