"""The schedule of a measurement, on a clock that only moves when a session runs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from optfuse.errors import EngineError
from optfuse.measure import Schedule, measure
from optfuse.stages import Measurement, Variant


class Clock:
    """Nanoseconds that pass only when somebody lets them pass."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class StubSession:
    """Takes a known time per run on the clock, and writes its name into a shared log."""

    inputs = ("x",)
    outputs = ("y",)

    def __init__(self, name: str, run_ms: float, clock: Clock, log: list[str]) -> None:
        self.name, self.run_ms, self.clock, self.log = name, run_ms, clock, log
        self.device = f"device of {name}"
        self.runs = 0
        self.garbage_collected = False

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        raise AssertionError("measure() takes sessions that are bound already")

    def run(self) -> None:
        # Every run takes a microsecond longer than the one before, so that each can be told apart.
        self.clock.now += round(self.run_ms * 1e6) + 1000 * self.runs
        self.runs += 1
        self.log.append(self.name)
        self.garbage_collected |= gc.isenabled()

    def fetch(self) -> list[torch.Tensor]:
        raise AssertionError("measure() does not look at outputs")

    def __enter__(self) -> StubSession:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class Bench:
    """Stub sessions on one clock, and what was run on them."""

    def __init__(self, **run_ms: float) -> None:
        self.clock = Clock()
        self.log: list[str] = []
        self.sessions = [
            StubSession(name, duration, self.clock, self.log) for name, duration in run_ms.items()
        ]

    def measure(self, schedule: Schedule | None = None, **options: Any) -> list[Measurement]:
        variants: tuple[Variant, ...] = ("baseline", "optimized", "control")
        named = [
            ("torch" if index > 2 else "onnxruntime", variants[index % 3], session)
            for index, session in enumerate(self.sessions)
        ]
        return measure(named, schedule=schedule, clock=self.clock, **options)


FIXED = Schedule(
    budget_seconds=1000, min_blocks=12, max_blocks=12, block_ms=40, warmup_ms=100, warmup_runs=3
)
"""12 rounds whatever they cost. At 10 ms a run: 10 runs of warm-up, 4 timed runs a block."""


def block_order(bench: Bench, warmup_runs: int, runs_per_block: int) -> list[list[str]]:
    """Which session each block belonged to, round by round."""
    count = len(bench.sessions)
    after = bench.log[count * warmup_runs :]
    size = runs_per_block + 1
    blocks = [after[start : start + size] for start in range(0, len(after), size)]
    assert all(len(set(block)) == 1 and len(block) == size for block in blocks)
    names = [block[0] for block in blocks]
    return [names[start : start + count] for start in range(0, len(names), count)]


def test_every_round_has_one_block_of_every_session_in_a_shuffled_order() -> None:
    bench = Bench(a=10, b=10, c=10, d=10)
    bench.measure(FIXED, seed=3)
    rounds = block_order(bench, warmup_runs=10, runs_per_block=4)
    assert len(rounds) == 12
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in rounds)
    # 12 draws of 24 orders: seeded, so this is a fact, and a fixed order would give 1.
    assert len({tuple(order) for order in rounds}) > 6


def test_the_seed_decides_the_order() -> None:
    logs = []
    for seed in (3, 3, 4):
        bench = Bench(a=10, b=10, c=10)
        bench.measure(FIXED, seed=seed)
        logs.append(bench.log)
    assert logs[0] == logs[1] != logs[2]


def test_blocks_line_up_and_stand_in_the_order_given() -> None:
    bench = Bench(a=10, b=2, c=50, d=10)
    results = bench.measure(FIXED)
    assert [(result.engine, result.variant) for result in results] == [
        ("onnxruntime", "baseline"),
        ("onnxruntime", "optimized"),
        ("onnxruntime", "control"),
        ("torch", "baseline"),
    ]
    assert [result.device for result in results] == [f"device of {name}" for name in "abcd"]
    assert [len(result.blocks) for result in results] == [12, 12, 12, 12]


def test_samples_are_the_runs_own_times_without_warm_up_and_without_a_blocks_first_run() -> None:
    bench = Bench(a=10, b=10)
    results = bench.measure(FIXED)
    # Run n takes 10 ms + n us. Runs 0 to 9 are warm-up (100 ms), run 10 begins the first block.
    expected = [10 + (10 + 5 * block + run) / 1000 for block in range(12) for run in (1, 2, 3, 4)]
    for result in results:
        # 1e-12: whole nanoseconds divided by a million.
        assert list(result.samples_ms) == pytest.approx(expected, rel=1e-12)


def test_a_session_is_warmed_up_for_the_time_and_the_runs_asked_for() -> None:
    long, short = Bench(a=80), Bench(a=10)
    long.measure(replace(FIXED, warmup_ms=100, warmup_runs=3))
    short.measure(replace(FIXED, warmup_ms=100, warmup_runs=3))
    assert len(long.log) == 3 + 12 * (1 + 3)  # 80 + 80 would be long enough, but only 2 runs
    assert len(short.log) == 10 + 12 * (1 + 4)


def test_a_block_has_enough_runs_to_last() -> None:
    results = Bench(a=0.5, b=7, c=300).measure(FIXED)
    # 40 ms of each, at least 3 runs. The stub's runs grow by a microsecond each: at 0.5 ms the
    # 140 or so of warm-up have grown to 0.6 ms by the half of them that is counted.
    assert len(results[0].blocks[0]) == pytest.approx(66, abs=8)
    assert len(results[1].blocks[0]) == 6
    assert len(results[2].blocks[0]) == 3
    assert all(len(set(map(len, result.blocks))) == 1 for result in results)


def test_the_default_takes_about_its_budget_on_five_sessions_of_40_ms() -> None:
    bench = Bench(a=40, b=40, c=40, d=40, e=40)
    results = bench.measure()
    assert 12e9 < bench.clock.now <= 15e9
    assert len(results[0].blocks) >= 15
    assert len(results[0].blocks[0]) == 3


def test_a_slow_model_gets_its_blocks_although_the_budget_is_spent() -> None:
    bench = Bench(a=2000, b=3000)
    results = bench.measure(Schedule(budget_seconds=5))
    assert [len(result.blocks) for result in results] == [10, 10]
    assert [len(result.samples_ms) for result in results] == [10, 10]


@pytest.mark.parametrize(("budget_seconds", "runs"), [(9, 3), (7, 2), (5, 1)])
def test_fewer_runs_a_block_rather_than_fewer_blocks(budget_seconds: int, runs: int) -> None:
    # Two sessions at 100 ms: a round of 3 timed runs and one before them takes 0.8 s.
    bench = Bench(a=100, b=100)
    results = bench.measure(Schedule(budget_seconds=budget_seconds))
    assert [len(result.blocks[0]) for result in results] == [runs, runs]
    assert all(len(result.blocks) >= 10 for result in results)
    assert bench.clock.now <= budget_seconds * 1e9


def test_a_fast_model_stops_before_the_budget_is_spent() -> None:
    bench = Bench(a=1, b=1)
    results = bench.measure()
    assert [len(result.blocks) for result in results] == [40, 40]
    assert bench.clock.now < 15e9


def test_a_session_faster_than_the_clock_still_ends_its_warm_up() -> None:
    bench = Bench(a=0.0)
    quick = Schedule(min_blocks=1, max_blocks=1, block_ms=1e-5, warmup_ms=1e-5, warmup_runs=1)
    (result,) = bench.measure(quick)
    assert len(result.blocks) == 1


def test_garbage_is_not_collected_while_the_clock_runs() -> None:
    assert gc.isenabled()
    bench = Bench(a=10)
    bench.measure(FIXED)
    assert not bench.sessions[0].garbage_collected
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        Bench(a=10).measure(FIXED)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_engine_that_fails_is_passed_on_and_the_collector_comes_back() -> None:
    class Broken(StubSession):
        def run(self) -> None:
            raise EngineError("The engine failed to run", "It is out of memory", "Close something")

    with pytest.raises(EngineError, match="out of memory"):
        measure([("torch", "baseline", Broken("a", 1, Clock(), []))], clock=Clock())
    assert gc.isenabled()


@pytest.mark.parametrize("schedule", [FIXED, Schedule(), Schedule(budget_seconds=1)])
def test_progress_grows_from_0_to_1(schedule: Schedule) -> None:
    told: list[tuple[str, float | None]] = []
    Bench(a=40, b=40).measure(schedule, notify=lambda text, done: told.append((text, done)))
    assert told[0] == ("Warming up onnxruntime baseline", None)
    assert told[1] == ("Warming up onnxruntime optimized", None)
    assert told[2] == ("Measuring latency, round 1", 0.0)
    assert told[-1] == ("Measured latency", 1.0)
    fractions = [done for _, done in told if done is not None]
    assert fractions == sorted(fractions)
    assert fractions[-2] < 1


def test_there_must_be_a_session() -> None:
    with pytest.raises(ValueError, match="there is no session to measure"):
        measure([])


def test_two_sessions_must_not_go_by_the_same_name() -> None:
    bench = Bench(a=1, b=1)
    first, second = bench.sessions
    with pytest.raises(ValueError, match="torch baseline is there twice"):
        measure([("torch", "baseline", first), ("torch", "baseline", second)])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"min_blocks": 0}, "1 <= min_blocks <= max_blocks"),
        ({"min_blocks": 9, "max_blocks": 8}, "1 <= min_blocks <= max_blocks"),
        ({"min_runs_per_block": 0}, "at least one run a block and one of warm-up"),
        ({"warmup_runs": 0}, "at least one run a block and one of warm-up"),
    ],
)
def test_a_schedule_must_make_sense(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Schedule(**changes)  # type: ignore[arg-type]


def test_a_number_of_blocks_fills_the_time() -> None:
    bench = Bench(a=10, b=40)
    schedule = Schedule.lasting(10.0, warmup_ms=100, blocks=20)
    results = bench.measure(schedule)
    assert [len(result.blocks) for result in results] == [20, 20]
    # 10 s less 0.26 s of warm-up over 20 rounds is 487 ms, less 10 + 40 ms that are not timed:
    # 218 ms for each block.
    assert {len(block) for block in results[0].blocks} == {22}
    assert {len(block) for block in results[1].blocks} == {6}
    assert 9.5e9 < bench.clock.now < 11e9


def test_a_number_of_blocks_is_kept_where_the_time_is_too_short() -> None:
    bench = Bench(a=100, b=100)
    results = bench.measure(Schedule.lasting(0.1, blocks=8))
    assert [[len(block) for block in result.blocks] for result in results] == [[1] * 8] * 2


def test_without_a_number_of_blocks_only_the_time_changes() -> None:
    assert Schedule.lasting(3.0) == Schedule(budget_seconds=3.0)
