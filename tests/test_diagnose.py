"""What makes measurements doubtful: each caveat on a case made for it, and none on a clean one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from optfuse.diagnose import diagnose
from optfuse.environment import Activity, GpuActivity
from optfuse.stages import Caveat, Measurement

BLOCKS, RUNS = 17, 3


def clean(seed: int = 0, blocks: int = BLOCKS, runs: int = RUNS) -> np.ndarray:
    """Milliseconds around 40, with 2.5 % of noise."""
    return 40 * np.exp(np.random.default_rng(seed).normal(0, 0.025, (blocks, runs)))


def measurement(
    samples: np.ndarray | Sequence[Sequence[float]],
    variant: str = "baseline",
    engine: str = "onnxruntime",
    device: str = "cpu",
) -> Measurement:
    return Measurement(
        engine, variant, device, tuple(tuple(map(float, block)) for block in samples)
    )


QUIET = Activity(
    taken_seconds=100.0,
    cores=4,
    load_average=[0.1, 0.1, 0.1],
    user_seconds=500.0,
    system_seconds=50.0,
    idle_seconds=9000.0,
    stolen_seconds=1.0,
    own_seconds=20.0,
    quota_seconds=0.0,
    clocks_mhz=(3000.0, 800.0, 800.0, 800.0),
    top_clocks_mhz=(3500.0, 3500.0, 3500.0, 3500.0),
    throttle_events=7,
    gpu=None,
)

LATER = replace(
    QUIET,
    taken_seconds=110.0,
    user_seconds=510.0,
    system_seconds=50.5,
    idle_seconds=9029.5,
    own_seconds=30.2,
)
"""Ten seconds in which this process kept one core busy, and others used 0.3 core-seconds."""

NOTHING_KNOWN = Activity(
    taken_seconds=100.0,
    cores=4,
    load_average=None,
    user_seconds=None,
    system_seconds=None,
    idle_seconds=None,
    stolen_seconds=None,
    own_seconds=20.0,
    quota_seconds=None,
    clocks_mhz=None,
    top_clocks_mhz=None,
    throttle_events=None,
    gpu=None,
)


def of_samples(*measurements: Measurement, threads: int = 1) -> list[Caveat]:
    return diagnose(measurements, QUIET, LATER, threads=threads)


def of_machine(after: Activity, threads: int = 1, device: str = "cpu") -> list[Caveat]:
    return diagnose([measurement(clean(), device=device)], QUIET, after, threads=threads)


def kinds(caveats: Sequence[Caveat]) -> list[str]:
    return [caveat.kind for caveat in caveats]


# --- Clean ones


def test_nothing_is_said_of_clean_samples_on_a_quiet_machine() -> None:
    three = [
        measurement(clean(seed), variant)
        for seed, variant in enumerate(("baseline", "control", "optimized"))
    ]
    assert of_samples(*three) == []
    assert diagnose(three, threads=1) == []
    assert diagnose(three, NOTHING_KNOWN, NOTHING_KNOWN, threads=2) == []
    assert diagnose([], QUIET, LATER, threads=1) == []


@pytest.mark.parametrize(("blocks", "runs"), [(10, 3), (17, 3), (40, 10)])
def test_a_clean_measurement_raises_a_false_alarm_once_in_50_at_most(
    blocks: int, runs: int
) -> None:
    trials = 200
    alarms = [
        kinds(diagnose([measurement(clean(seed, blocks, runs))], threads=1))
        for seed in range(trials)
    ]
    # 2 % and three standard deviations of 200 such flips: 0.02 + 3 * 0.0099.
    assert sum(map(bool, alarms)) <= 0.05 * trials


def test_one_run_alone_is_no_reason_to_fail() -> None:
    assert kinds(diagnose([measurement([[40.0]])], threads=2)) == ["few_runs"]


# --- What the samples say


def test_a_warm_up_that_was_too_short() -> None:
    samples = clean()
    samples[:4] *= 1.3
    assert of_samples(measurement(samples)) == [
        Caveat(
            "not_settled",
            "onnxruntime baseline",
            "The first 4 of 17 blocks took 29% longer than the second half of the run",
            "The warm-up was too short for the clocks, caches or thread pools to settle",
            "Measure longer with --duration, or warm up longer with 'optfuse bench --warmup'",
        )
    ]


def test_a_boost_that_ended() -> None:
    samples = clean()
    samples[:4] *= 0.8
    found = of_samples(measurement(samples))
    assert kinds(found) == ["not_settled"]
    assert found[0].finding == (
        "The first 4 of 17 blocks took 20% less than the second half of the run"
    )


def test_samples_that_drift() -> None:
    # 20 %, which a slope through blocks of 3 noisy runs is within 4 % of.
    ramp = np.linspace(1, 1.2, BLOCKS)[:, None]
    steady, drifting = measurement(clean(1), "control"), measurement(clean() * ramp)
    assert of_samples(drifting, steady) == [
        Caveat(
            "trend",
            "onnxruntime baseline",
            "At the end a run took 24% longer than at the beginning",
            "The clock changes with heat, or other load comes or goes",
            "Measure again on a quiet machine; a drift of one alone is in its ratio too",
        )
    ]
    together = of_samples(drifting, measurement(clean(1) * ramp[::-1], "control"))
    assert kinds(together) == ["trend"]
    assert together[0].about == "every measurement"
    assert together[0].next_step == (
        "Trust the ratios, where a drift of all cancels, rather than the medians"
    )


def test_samples_that_get_faster_all_the_time_are_no_matter_of_the_warm_up() -> None:
    samples = clean() * np.linspace(1.3, 1, BLOCKS)[:, None]
    found = of_samples(measurement(samples))
    assert kinds(found) == ["trend"]
    assert found[0].finding.endswith("less than at the beginning")


def test_two_levels_one_after_the_other_are_a_trend() -> None:
    samples = clean(0, 40)
    samples[15:] *= 1.2
    assert "bimodal" not in kinds(of_samples(measurement(samples)))


def test_two_latencies() -> None:
    slow = np.random.default_rng(1).random((40, 3)) < 0.4
    samples = clean(0, 40) * np.where(slow, 1.25, 1.0)
    assert of_samples(measurement(samples)) == [
        Caveat(
            "bimodal",
            "onnxruntime baseline",
            "It has two latencies: 62% of the runs took about 40.2 ms and 38% about 49.7 ms",
            "The clock has two levels, cores differ in speed, or threads get in each other's way",
            "Measure with --threads 1 and pinned to one kind of core, for example with 'taskset'",
        )
    ]


def test_two_latencies_that_are_close_decide_nothing() -> None:
    even = np.exp(np.random.default_rng(0).normal(0, 0.005, (40, 3)))
    slow = np.random.default_rng(1).random((40, 3)) < 0.4
    assert of_samples(measurement(40 * even * np.where(slow, 1.04, 1.0))) == []


def test_blocks_that_scatter() -> None:
    loud = np.exp(np.random.default_rng(2).normal(0, 0.12, (40, 1))) * clean(0, 40)
    assert of_samples(measurement(loud), measurement(clean(1, 40), "control")) == [
        Caveat(
            "noise",
            "onnxruntime baseline",
            "Its blocks scatter by 11%",
            "Something takes time from it now and then, which a small change drowns in",
            "Stop what else is running, and measure longer with --duration",
        )
    ]


def test_runs_that_were_interrupted() -> None:
    random = np.random.default_rng(3)
    samples = clean(0, 40)
    hit = random.random(samples.shape) < 0.1
    samples[hit] *= 1.5
    samples[7, 1] = 90.0
    assert of_samples(measurement(samples)) == [
        Caveat(
            "outliers",
            "onnxruntime baseline",
            "9% of the runs took more than 44.8 ms, the slowest 90 ms",
            "Other processes or interrupts held them up",
            "Trust the median rather than the mean and the highest percentiles, or measure again "
            "on a quiet machine",
        )
    ]


def test_two_interrupted_runs_of_30_are_nothing() -> None:
    samples = clean(0, 10)
    samples[3, 0] = samples[7, 2] = 80.0
    assert of_samples(measurement(samples)) == []
    samples[5, 1] = 80.0
    assert kinds(of_samples(measurement(samples))) == ["outliers"]


@pytest.mark.parametrize(
    ("runs", "finding"),
    [
        (1, "Each block has 1 run, and one that is interrupted spoils the block"),
        (2, "Each block has 2 runs, and one that is interrupted spoils the block"),
    ],
)
def test_blocks_of_too_few_runs(runs: int, finding: str) -> None:
    assert of_samples(measurement(clean(0, BLOCKS, runs))) == [
        Caveat(
            "few_runs",
            "onnxruntime baseline",
            finding,
            "A run takes long for the time that was given to all of them",
            "Measure longer with --duration",
        )
    ]


def test_runs_that_are_hardly_longer_than_a_call() -> None:
    assert of_samples(measurement(clean() / 8000)) == [
        Caveat(
            "short",
            "onnxruntime baseline",
            "A run takes 0.00501 ms",
            "Calling an engine from Python takes microseconds by itself, which are part of that",
            "Compare them on larger inputs, for example with 'optfuse bench --batch'",
        )
    ]


@pytest.mark.parametrize(
    ("samples", "finding"),
    [
        (np.round(clean(0, 40)), "Latencies come in steps of 1 ms"),
        (np.full((BLOCKS, RUNS), 40.0), "All runs took exactly the same time"),
    ],
    ids=["steps", "one step"],
)
def test_a_clock_that_is_too_coarse(samples: np.ndarray, finding: str) -> None:
    assert of_samples(measurement(samples)) == [
        Caveat(
            "resolution",
            "onnxruntime baseline",
            finding,
            "The clock of this system is too coarse for runs as short as these",
            "Compare them on larger inputs, for example with 'optfuse bench --batch'",
        )
    ]


def test_a_fine_clock_may_give_the_same_latency_twice() -> None:
    assert of_samples(measurement(np.round(clean(0, 40), 1))) == []


def test_the_same_caveat_of_several_measurements_is_said_once_with_the_worst_figures() -> None:
    first, second, third = clean(0), clean(1), clean(2)
    first[:4] *= 1.3
    second[:3] *= 2.5
    found = of_samples(
        measurement(first), measurement(second, engine="torch"), measurement(third, "optimized")
    )
    assert kinds(found) == ["not_settled"]
    assert found[0].about == "onnxruntime baseline, torch baseline"
    assert found[0].finding.startswith("The first 3 of 17 blocks took 2.5 times as long as the")


# --- Threads that spin


def stalled() -> np.ndarray:
    """A tenth of the runs takes some seconds."""
    random = np.random.default_rng(4)
    samples = clean(0, 27, 1)
    samples[:3] = [[2540.3], [1309.0], [401.0]]
    return samples * np.exp(random.normal(0, 0.05, samples.shape))


def test_threads_that_spin_on_too_few_cores() -> None:
    two = [measurement(stalled(), engine="torch"), measurement(clean(1, 27), "control")]
    on_two_cores = replace(QUIET, cores=2), replace(LATER, cores=2)
    found = diagnose(two, *on_two_cores, threads=2)
    assert found == [
        Caveat(
            "spinning",
            "torch baseline",
            "3% of the runs took more than 5 times as long as the others, up to 2459 ms",
            "An engine's 2 threads wait for each other by spinning, and one that loses its core to "
            "another thread holds up all of them",
            "Measure with --threads 1, or each in a process of its own with "
            "'optfuse bench --isolated'",
        ),
        # What else is odd about those samples has the same cause; how few they are has not.
        replace(FEW_RUNS, about="torch baseline"),
    ]


FEW_RUNS = Caveat(
    "few_runs",
    "",
    "Each block has 1 run, and one that is interrupted spoils the block",
    "A run takes long for the time that was given to all of them",
    "Measure longer with --duration",
)


@pytest.mark.parametrize(
    ("threads", "cores", "device"), [(1, 2, "cpu"), (2, 4, "cpu"), (2, 2, "NVIDIA H200")]
)
def test_slow_runs_without_a_thread_on_every_core_are_no_matter_of_spinning(
    threads: int, cores: int, device: str
) -> None:
    found = diagnose(
        [measurement(stalled(), device=device)],
        replace(QUIET, cores=cores),
        replace(LATER, cores=cores),
        threads=threads,
    )
    assert "spinning" not in kinds(found)
    assert "not_settled" in kinds(found)


def test_one_slow_run_is_no_matter_of_spinning() -> None:
    samples = clean()
    samples[3, 1] = 900.0
    assert of_samples(measurement(samples), threads=4) == []


@pytest.mark.parametrize(
    ("threads", "count"), [(1, "1 thread"), (2, "2 threads")], ids=["one", "two"]
)
def test_more_cores_than_the_threads_that_were_asked_for(threads: int, count: str) -> None:
    found = of_machine(replace(LATER, user_seconds=533.0, own_seconds=53.0), threads=threads)
    assert found == [
        Caveat(
            "spinning",
            "this machine",
            f"optfuse kept 3.3 cores busy, and each engine was given {count}",
            "The thread pools of the engines that were waiting for their turn spun meanwhile",
            "Measure one engine at a time, or each in a process of its own with "
            "'optfuse bench --isolated'",
        )
    ]
    assert of_machine(replace(LATER, user_seconds=533.0, own_seconds=53.0), threads=4) == []


# --- What the machine did


def test_a_session_on_another_device_than_asked() -> None:
    two = [
        measurement(clean(0), engine="onnxruntime-cuda"),
        measurement(clean(1), device="NVIDIA H200", engine="tensorrt"),
    ]
    asked = {"onnxruntime-cuda": "gpu", "tensorrt": "gpu"}
    assert diagnose(two, threads=1, asked_devices=asked) == [
        Caveat(
            "wrong_device",
            "onnxruntime-cuda baseline",
            "It ran on cpu, and gpu was asked for",
            "The engine fell back because a driver or a provider could not be loaded",
            "See what 'optfuse engines' says of it, and leave these figures out until it is mended",
        )
    ]
    named = {"onnxruntime-cuda": "cpu", "tensorrt": "NVIDIA L4"}
    found = diagnose(two, threads=1, asked_devices=named)
    assert [caveat.finding for caveat in found] == [
        "It ran on NVIDIA H200, and NVIDIA L4 was asked for"
    ]


def test_other_load() -> None:
    assert of_machine(replace(LATER, user_seconds=528.0)) == [
        Caveat(
            "busy",
            "this machine",
            "Other processes used 1.8 of its 4 cores meanwhile",
            "Something else was running, and took cores, caches and memory bandwidth from it",
            "Stop what else is running, and measure again",
        )
    ]


def test_a_little_other_load_is_nothing() -> None:
    assert of_machine(replace(LATER, system_seconds=53.9)) == []  # 3.7 of 40 core-seconds


def test_stolen_time() -> None:
    assert of_machine(replace(LATER, stolen_seconds=2.2)) == [
        Caveat(
            "stolen_time",
            "this machine",
            "The hypervisor took 3% of the cores' time away",
            "Other virtual machines on the same host were busy",
            "Measure again at another time, or on a machine that is not shared",
        )
    ]
    assert of_machine(replace(LATER, stolen_seconds=1.3)) == []


def test_a_quota_that_was_used_up() -> None:
    assert of_machine(replace(LATER, quota_seconds=1.25)) == [
        Caveat(
            "quota",
            "this machine",
            "The container's CPU quota kept it from running for 1.2 s of 10 s",
            "More threads wanted to run than the quota has time for",
            "Give the container more CPU time, or measure with fewer --threads",
        )
    ]
    assert of_machine(replace(LATER, quota_seconds=0.05)) == []


def test_a_thermal_limit() -> None:
    assert of_machine(replace(LATER, throttle_events=8)) == [
        Caveat(
            "throttled",
            "this machine",
            "The processor ran into its thermal limit",
            "It got too hot to keep its clock up",
            "Let it cool down, or cool it better, and measure again",
        )
    ]


def test_a_clock_that_was_low_from_the_start() -> None:
    assert of_machine(replace(LATER, clocks_mhz=(800.0, 1200.0, 800.0, 800.0))) == [
        Caveat(
            "slow_clock",
            "this machine",
            "Its clock was at 1.2 GHz of 3.5 GHz",
            "A power-saving setting or a limit of power or heat keeps it down",
            "Set the frequency governor to 'performance', or lock the GPU's clock, and measure "
            "again",
        )
    ]
    assert of_machine(replace(LATER, top_clocks_mhz=(0.0,) * 4)) == []
    assert of_machine(replace(LATER, top_clocks_mhz=None)) == []


def test_a_gpu_that_was_held_back() -> None:
    hot = replace(LATER, gpu=GpuActivity(900.0, 1980.0, False, ("a thermal limit",)))
    found = of_machine(hot, device="NVIDIA H200")
    assert found == [
        Caveat(
            "throttled",
            "the GPU",
            "Its clock was held down by a thermal limit",
            "It got too hot, or drew more power than it may",
            "See what 'nvidia-smi -q -d PERFORMANCE' says, and measure again when it is cool",
        ),
        replace(found[1], kind="slow_clock", about="the GPU"),
    ]
    assert found[1].finding == "Its clock was at 0.9 GHz of 2.0 GHz"
    assert of_machine(hot) == []  # nothing ran on it


@pytest.mark.parametrize(
    "gpu",
    [
        GpuActivity(345.0, 1980.0, True, ()),
        GpuActivity(1900.0, 1980.0, False, ()),
        GpuActivity(None, None, False, ()),
    ],
    ids=["idle", "fast", "silent"],
)
def test_a_gpu_that_was_not_held_back(gpu: GpuActivity) -> None:
    assert of_machine(replace(LATER, gpu=gpu), device="NVIDIA H200") == []


def test_a_blink_of_an_eye_is_too_short_for_percentages() -> None:
    blink = replace(LATER, taken_seconds=100.5, stolen_seconds=1.1, user_seconds=520.0)
    assert of_machine(blink) == []


def test_the_most_important_comes_first() -> None:
    after = replace(
        LATER,
        user_seconds=560.0,
        own_seconds=45.0,
        stolen_seconds=5.0,
        throttle_events=9,
        quota_seconds=2.0,
        clocks_mhz=(800.0,) * 4,
    )
    samples = clean(0, 40, 2)
    samples[:6] *= 1.4
    samples[np.random.default_rng(5).random(samples.shape) < 0.12] *= 1.6
    found = diagnose(
        [measurement(samples)], QUIET, after, threads=1, asked_devices={"onnxruntime": "gpu"}
    )
    assert kinds(found) == [
        *("wrong_device", "spinning", "throttled", "slow_clock", "quota", "stolen_time", "busy"),
        *("not_settled", "outliers", "few_runs"),
    ]


def test_caveats_read_as_sentences() -> None:
    after = replace(LATER, user_seconds=560.0, stolen_seconds=5.0, throttle_events=9)
    for caveat in diagnose([measurement(stalled())], QUIET, after, threads=4):
        for part in (caveat.finding, caveat.cause, caveat.next_step):
            assert part[0].isupper() or part[0].isdigit() or part.startswith("optfuse")
            assert not part.endswith(".")
