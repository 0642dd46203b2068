"""The statistics against known answers: by hand, and by simulation where the truth is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from optfuse.stats import (
    DIP_LIMIT,
    LEAST_CHANGE,
    MINIMUM_BLOCKS,
    Distance,
    Outliers,
    Ratio,
    Resolution,
    Settling,
    Trend,
    block_spread,
    dip,
    distance,
    modes,
    noise_floor,
    outliers,
    paired_ratio,
    resolution,
    settling,
    summarise,
    trend,
    verdict,
)

RESAMPLES = 1000  # enough for a 95 % quantile; keeps the simulations to seconds

# --- Summaries


def test_a_summary_gives_the_figures_worked_out_by_hand() -> None:
    summary = summarise([float(n) for n in range(1, 101)])
    # 1e-12: a few roundings of float64.
    assert summary.median_ms == pytest.approx(50.5, rel=1e-12)
    assert summary.p90_ms == pytest.approx(90.1, rel=1e-12)
    assert summary.p95_ms == pytest.approx(95.05, rel=1e-12)
    assert summary.p99_ms == pytest.approx(99.01, rel=1e-12)
    assert summary.mean_ms == pytest.approx(50.5, rel=1e-12)
    assert summary.std_ms == pytest.approx(math.sqrt(100 * 101 / 12), rel=1e-12)
    assert (summary.min_ms, summary.max_ms) == (1.0, 100.0)
    assert summary.throughput_per_s == pytest.approx(1000 / 50.5, rel=1e-12)


def test_one_sample_has_no_spread() -> None:
    summary = summarise([4.0])
    assert (summary.std_ms, summary.p99_ms, summary.throughput_per_s) == (0.0, 4.0, 250.0)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([], "there is no sample"),
        ([1.0, 0.0], "every sample must be a positive finite number of milliseconds"),
        ([1.0, -2.0], "every sample must be a positive finite number of milliseconds"),
        ([1.0, math.nan], "every sample must be a positive finite number of milliseconds"),
        ([1.0, math.inf], "every sample must be a positive finite number of milliseconds"),
    ],
)
def test_a_summary_refuses_what_is_no_latency(samples: list[float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        summarise(samples)


# --- Ratios

Blocks = list[list[float]]


def simulated_blocks(
    random: np.random.Generator, speed_up: float, blocks: int, noise: float, spikes: float
) -> tuple[Blocks, Blocks]:
    """Milliseconds of a baseline and of a candidate that is `speed_up` times faster.

    Both share a slow drift of the machine; each has its own lognormal noise on every run, a quarter
    of it on every block, and a spike of 50 % on average in a share of the runs.
    """
    drift = np.cumsum(random.normal(0, 0.01, blocks))[:, None]

    def runs() -> np.ndarray:
        jitter = random.normal(0, noise, (blocks, 3)) + random.normal(0, noise / 4, (blocks, 1))
        hit = random.random((blocks, 3)) < spikes
        return np.exp(drift + jitter + hit * random.exponential(0.5, (blocks, 3)))

    return (40 * runs()).tolist(), (40 / speed_up * runs()).tolist()


@pytest.mark.parametrize(
    ("blocks", "noise", "spikes"),
    [(8, 0.02, 0.05), (10, 0.01, 0.0), (17, 0.02, 0.05), (40, 0.03, 0.1)],
)
def test_the_interval_covers_the_true_ratio_in_95_of_100_runs(
    blocks: int, noise: float, spikes: float
) -> None:
    random = np.random.default_rng(blocks)
    trials, covered = 400, 0
    for trial in range(trials):
        baseline, candidate = simulated_blocks(random, 1.1, blocks, noise, spikes)
        ratio = paired_ratio(baseline, candidate, seed=trial, resamples=RESAMPLES)
        assert ratio.low <= ratio.ratio <= ratio.high
        covered += ratio.low <= 1.1 <= ratio.high
    # 95 %, give or take three standard deviations of 400 coin flips: 0.95 +- 3 * 0.011.
    assert 0.917 <= covered / trials <= 0.983


def test_a_control_against_itself_is_undecided_at_least_19_times_in_20() -> None:
    random = np.random.default_rng(1)
    decided_beside_floor = decided_without_floor = 0
    trials = 300
    for trial in range(trials):
        first = paired_ratio(*simulated_blocks(random, 1, 17, 0.02, 0.05), trial, 0.95, RESAMPLES)
        second = paired_ratio(*simulated_blocks(random, 1, 17, 0.02, 0.05), trial, 0.95, RESAMPLES)
        decided_beside_floor += verdict(first, noise_floor(second)) != "undecided"
        decided_without_floor += verdict(first, 1.0) != "undecided"
    assert decided_beside_floor <= trials / 20
    # The floor is what makes the promise safe: the interval alone is wrong 5 % of the time, plus
    # three standard deviations of 300 coin flips (3 * 0.0126).
    assert decided_without_floor <= trials * 0.088


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.03])
@pytest.mark.parametrize(("speed_up", "expected"), [(1.05, "faster"), (1 / 1.05, "slower")])
def test_a_change_of_5_percent_is_found(noise: float, speed_up: float, expected: str) -> None:
    random = np.random.default_rng(2)
    trials, found, wrong = 100, 0, 0
    for trial in range(trials):
        control = paired_ratio(*simulated_blocks(random, 1, 17, noise, 0.05), trial, 0.95, 500)
        changed = paired_ratio(
            *simulated_blocks(random, speed_up, 17, noise, 0.05), trial, 0.95, 500
        )
        given = verdict(changed, noise_floor(control))
        found += given == expected
        wrong += given not in (expected, "undecided")
    assert found >= 95
    assert wrong == 0


def test_a_ratio_of_known_medians_is_exact() -> None:
    baseline = [[30.0, 31.0, 300.0]] * 10  # median 31, whatever the interrupted run took
    candidate = [[20.0, 10.0]] * 10  # median 15; the number of runs may differ
    ratio = paired_ratio(baseline, candidate, seed=0)
    # 1e-12: exp(log(a) - log(b)) in float64.
    assert ratio.ratio == pytest.approx(31 / 15, rel=1e-12)
    assert ratio.low == ratio.high == ratio.ratio


def test_what_slows_both_sides_of_a_block_cancels() -> None:
    slowness = [1.0, 5.0, 2.0, 9.0, 3.0, 1.5, 7.0, 4.0, 6.0]
    baseline = [[3.0 * slow] for slow in slowness]
    candidate = [[2.0 * slow] for slow in slowness]
    ratio = paired_ratio(baseline, candidate, seed=0)
    # 1e-12: logs of float64 numbers; unpaired, the interval would span a factor of several.
    assert ratio.low == pytest.approx(1.5, rel=1e-12)
    assert ratio.high == pytest.approx(1.5, rel=1e-12)


def test_the_seed_decides_the_interval() -> None:
    baseline, candidate = simulated_blocks(np.random.default_rng(3), 1.2, 12, 0.02, 0.05)
    once = paired_ratio(baseline, candidate, seed=7, resamples=RESAMPLES)
    assert once == paired_ratio(baseline, candidate, seed=7, resamples=RESAMPLES)
    other = paired_ratio(baseline, candidate, seed=8, resamples=RESAMPLES)
    assert other.ratio == once.ratio
    assert other.low != once.low


def test_more_confidence_takes_a_wider_interval() -> None:
    baseline, candidate = simulated_blocks(np.random.default_rng(4), 1.2, 12, 0.02, 0.05)
    usual = paired_ratio(baseline, candidate, seed=0, confidence=0.95)
    surer = paired_ratio(baseline, candidate, seed=0, confidence=0.99)
    assert surer.low < usual.low < usual.high < surer.high


def test_swapping_the_two_sides_inverts_the_ratio() -> None:
    baseline, candidate = simulated_blocks(np.random.default_rng(5), 1.2, 12, 0.02, 0.05)
    forth = paired_ratio(baseline, candidate, seed=0)
    back = paired_ratio(candidate, baseline, seed=0)
    # 1e-12: the same numbers with the other sign, summed in the opposite order.
    assert back.ratio == pytest.approx(1 / forth.ratio, rel=1e-12)
    assert back.low == pytest.approx(1 / forth.high, rel=1e-12)


@pytest.mark.parametrize(
    ("baseline", "candidate", "sentence"),
    [
        ([[1.0]] * 9, [[1.0]] * 8, "9 blocks cannot be paired with 8"),
        ([[1.0]] * 7, [[1.0]] * 7, f"at least {MINIMUM_BLOCKS} pairs of blocks, not 7"),
        ([[1.0]] * 8, [*[[1.0]] * 7, []], "there is no sample"),
        ([[1.0]] * 8, [*[[1.0]] * 7, [0.0]], "every sample must be a positive finite number"),
    ],
)
def test_a_ratio_refuses_blocks_it_cannot_pair(
    baseline: Blocks, candidate: Blocks, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        paired_ratio(baseline, candidate, seed=0)


def test_the_noise_floor_is_the_edge_farthest_from_one() -> None:
    # 1e-12: exp of log.
    assert noise_floor(Ratio(1.0, 0.99, 1.02)) == pytest.approx(1.02, rel=1e-12)
    assert noise_floor(Ratio(0.99, 0.97, 1.01)) == pytest.approx(1 / 0.97, rel=1e-12)
    assert noise_floor(Ratio(1.03, 1.02, 1.04)) == pytest.approx(1.04, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "floor", "expected"),
    [
        (Ratio(1.10, 1.05, 1.15), 1.02, "faster"),
        (Ratio(0.90, 0.85, 0.95), 1.02, "slower"),
        (Ratio(1.10, 0.99, 1.20), 1.02, "undecided"),  # the interval holds 1
        (Ratio(0.95, 0.85, 1.01), 1.02, "undecided"),
        (Ratio(1.02, 1.01, 1.03), 1.03, "undecided"),  # inside the noise
        (Ratio(0.98, 0.97, 0.99), 1.03, "undecided"),
        (Ratio(1.0, 1.0, 1.0), 1.0, "undecided"),
    ],
)
def test_a_verdict_takes_the_whole_interval_and_the_noise(
    ratio: Ratio, floor: float, expected: str
) -> None:
    assert verdict(ratio, floor) == expected


@pytest.mark.parametrize("floor", [0.98, math.nan])
def test_a_verdict_refuses_a_floor_below_one(floor: float) -> None:
    with pytest.raises(ValueError, match="a noise floor is a ratio of at least 1, not"):
        verdict(Ratio(1.1, 1.0, 1.2), floor)


# --- The promise of a verdict, on whole schedules
#
# Three variants, the last one the control, run in rounds of shuffled order, as `measure` does. What
# the machine does is one series along the time of all runs; the baseline's blocks are in both
# ratios, as in a report.

Level = Callable[[np.random.Generator, int], np.ndarray]
"""What the machine does to each run, in the order of time, as a logarithm."""


def still(random: np.random.Generator, runs: int) -> np.ndarray:
    return np.zeros(runs)


def drifting(random: np.random.Generator, runs: int) -> np.ndarray:
    """20 % slower at the end, with a wave of 10 % on the way."""
    time = np.linspace(0, 1, runs)
    return 0.2 * time + 0.1 * np.sin(9 * time)


def autocorrelated(random: np.random.Generator, runs: int) -> np.ndarray:
    """Each run resembles the one before it (rho = 0.95); a standard deviation of 5 %."""
    level = random.normal(0, 0.05, runs)
    for run in range(1, runs):
        level[run] = 0.95 * level[run - 1] + math.sqrt(1 - 0.95**2) * level[run]
    return level


def interrupted(random: np.random.Generator, runs: int) -> np.ndarray:
    """Another process makes stretches of 12 runs on average 50 % slower, a fifth of the time."""
    chances, busy = random.random(runs), np.zeros(runs, bool)
    for run in range(1, runs):
        busy[run] = chances[run] >= 1 / 12 if busy[run - 1] else chances[run] < 1 / 48
    return math.log(1.5) * busy


def wandering(random: np.random.Generator, rho: float, blocks: int) -> np.ndarray:
    """Of each of three variants by itself, block by block; a standard deviation of 2 %."""
    own = random.normal(0, 0.02, (blocks, 3))
    for block in range(1, blocks):
        own[block] = rho * own[block - 1] + math.sqrt(1 - rho**2) * own[block]
    return own


def simulated_schedule(
    random: np.random.Generator,
    blocks: int,
    noise: float,
    spikes: float,
    level: Level,
    speed_up: float = 1.0,
    rho: float | None = None,
) -> tuple[Blocks, Blocks, Blocks]:
    """Baseline, candidate and control, 3 runs a block."""
    shape = (blocks, 3, 3)
    runs = level(random, 9 * blocks).reshape(shape) + random.normal(0, noise, shape)
    runs += (random.random(shape) < spikes) * random.exponential(0.5, shape)
    order = np.argsort(random.random((blocks, 3)), axis=1)
    runs = np.take_along_axis(runs, order[:, :, None], axis=1)
    if rho is not None:
        runs += wandering(random, rho, blocks)[:, :, None]
    runs[:, 1] -= math.log(speed_up)
    baseline, candidate, control = np.moveaxis(40 * np.exp(runs), 1, 0).tolist()
    return baseline, candidate, control


NOISE_MODELS = {
    "lognormal, 2 %": (0.02, 0.0, still),
    "lognormal, 3 %": (0.03, 0.0, still),
    "spikes in 10 % of the runs": (0.02, 0.1, still),
    "slow drift of the machine": (0.02, 0.0, drifting),
    "autocorrelated": (0.01, 0.0, autocorrelated),
    "another process": (0.02, 0.0, interrupted),
}
"""Noise of a run, share of spikes of 50 % on average, and what the machine does."""

every_noise = pytest.mark.parametrize("model", NOISE_MODELS.values(), ids=NOISE_MODELS)


@every_noise
def test_an_a_a_comparison_is_undecided_at_least_19_times_in_20(
    model: tuple[float, float, Level],
) -> None:
    random = np.random.default_rng(11)
    trials, decided, covered = 300, 0, 0
    for trial in range(trials):
        baseline, same, control = simulated_schedule(random, 17, *model)
        ratio = paired_ratio(baseline, same, trial, resamples=400)
        floor = noise_floor(paired_ratio(baseline, control, trial, resamples=400))
        decided += verdict(ratio, floor) != "undecided"
        covered += ratio.low <= 1 <= ratio.high
    # The truth is below 1 in 100 for all of them: the control comes on top of the interval.
    assert decided <= trials / 20
    # 95 %, give or take three standard deviations of 300 coin flips: 0.95 +- 3 * 0.0126.
    assert 0.912 <= covered / trials <= 0.988


@every_noise
def test_a_change_of_5_percent_is_found_beside_its_own_control(
    model: tuple[float, float, Level],
) -> None:
    random = np.random.default_rng(12)
    trials, given = 100, []
    for trial in range(trials):
        baseline, candidate, control = simulated_schedule(random, 17, *model, speed_up=1.05)
        floor = noise_floor(paired_ratio(baseline, control, trial, resamples=400))
        given.append(verdict(paired_ratio(baseline, candidate, trial, resamples=400), floor))
    # 97 of 100 is the truth of the hardest of them, where the drift moves on within a round; two
    # standard deviations of 100 coin flips less are 94.
    assert given.count("faster") >= 94
    assert given.count("slower") == 0


def test_variants_that_wander_by_themselves_are_undecided_19_times_in_20_too() -> None:
    random = np.random.default_rng(13)
    trials, decided = 300, 0
    for trial in range(trials):
        baseline, same, control = simulated_schedule(random, 40, 0.02, 0.0, still, rho=0.7)
        floor = noise_floor(paired_ratio(baseline, control, trial, resamples=400))
        decided += verdict(paired_ratio(baseline, same, trial, resamples=400), floor) != "undecided"
    # As if all pairs were independent, 8 of 100 would be decided.
    assert decided <= trials / 20


def test_pairs_that_resemble_their_neighbours_widen_the_interval() -> None:
    logs = np.random.default_rng(14).normal(0, 0.02, 20)
    same = [[40.0]] * logs.size

    def width(pairs: np.ndarray) -> float:
        ratio = paired_ratio([[40 * math.exp(log)] for log in pairs], same, seed=0)
        return math.log(ratio.high / ratio.low)

    # Sorted, their correlation counts as 0.8, which widens threefold: sqrt(1.8 / 0.2). 10 % for the
    # bootstrap, which draws by position.
    assert width(np.sort(logs)) == pytest.approx(3 * width(logs), rel=0.1)
    alternating = np.ravel(np.column_stack([np.sort(logs)[:10], np.sort(logs)[:9:-1]]))
    assert width(alternating) == pytest.approx(width(logs), rel=0.1)


# --- Whether the samples look as they should


def simulated_samples(
    seed: int, blocks: int = 17, runs: int = 3, shape: str = "lognormal"
) -> np.ndarray:
    """Milliseconds of clean but noisy blocks around 40 ms, each with a single mode."""
    random = np.random.default_rng(seed)
    size = (blocks, runs)
    logs = {
        "lognormal": lambda: random.normal(0, 0.025, size),
        "blocks differ": lambda: random.normal(0, 0.02, size) + random.normal(0, 0.02, (blocks, 1)),
        "exponential tail": lambda: random.normal(0, 0.01, size) + random.exponential(0.04, size),
        "Pareto tail": lambda: (
            random.normal(0, 0.01, size) + np.log1p(0.05 * random.pareto(2, size))
        ),
        "spikes": lambda: (
            random.normal(0, 0.025, size)
            + (random.random(size) < 0.1) * random.exponential(0.5, size)
        ),
        "walk": lambda: (
            random.normal(0, 0.02, size) + np.cumsum(random.normal(0, 0.01, (blocks, 1)), axis=0)
        ),
    }[shape]()
    return 40 * np.exp(logs)


SHAPES = ["lognormal", "blocks differ", "exponential tail", "Pareto tail", "spikes", "walk"]

AT_MOST_3_IN_100 = 18
"""Alarms in 300 runs: 9, and three standard deviations of 300 such flips are 9 more."""


def test_outliers_worked_out_by_hand() -> None:
    blocks = [[10.0, 10.1], [9.9, 10.2], [10.3, 20.0]]
    # The median logarithm is halfway between those of 10.1 and 10.2.
    logs = np.log([10.0, 10.1, 9.9, 10.2, 10.3, 20.0])
    centre = math.log(10.1 * 10.2) / 2
    deviations = np.sort(np.abs(logs - centre))
    limit_ms = math.exp(centre + 3.5 * 1.4826 * (deviations[2] + deviations[3]) / 2)
    found = outliers(blocks)
    # 1e-12: a few roundings of float64.
    assert found.limit_ms == pytest.approx(limit_ms, rel=1e-12)
    assert (found.share, found.slowest_ms) == (1 / 6, 20.0)


def test_what_is_5_percent_slower_is_no_outlier_however_even_the_others_are() -> None:
    found = outliers([[10.0] * 9 + [10.4], [10.0] * 9 + [10.6]])
    # 1e-12: exp of log.
    assert found.limit_ms == pytest.approx(10 * LEAST_CHANGE, rel=1e-12)
    assert found == Outliers(found.limit_ms, 1 / 20, 10.6)


def test_spikes_are_outliers_and_noise_is_not() -> None:
    quiet = [outliers(simulated_samples(seed, 40).tolist()).share for seed in range(100)]
    spiky = [
        outliers(simulated_samples(seed, 40, 3, "spikes").tolist()).share for seed in range(100)
    ]
    # 3.5 standard deviations are 0.02 % of normal noise; 2 runs in 120 leave room for the estimate.
    assert max(quiet) <= 2 / 120
    # A tenth of the runs is hit, and exp(-0.09 / 0.5) = 84 % of the spikes exceed the limit of 9 %.
    assert np.mean(spiky) == pytest.approx(0.084, abs=0.01)


def test_a_trend_worked_out_by_hand() -> None:
    found = trend([[10 * 1.01**block] for block in range(10)])
    # 1e-12: logs and their exponentials. All 45 pairs rise, and the variance of their count is
    # 10 * 9 * 25 / 18 = 125: z = 44 / sqrt(125).
    assert found.change == pytest.approx(1.01**9 - 1, rel=1e-12)
    assert found.p_value == pytest.approx(math.erfc(44 / math.sqrt(250)), rel=1e-12)


def test_ties_count_in_a_trend() -> None:
    found = trend([[1.0], [1.0], [2.0], [2.0], [3.0]])
    # 8 of 10 pairs rise, two are ties: variance (5 * 4 * 15 - 2 * 2 * 1 * 9) / 18 = 264 / 18.
    assert found.p_value == pytest.approx(math.erfc(7 / math.sqrt(2 * 264 / 18)), rel=1e-12)


@pytest.mark.parametrize("blocks", [[[3.0]], [[3.0], [3.0], [3.0]]], ids=["one", "equal"])
def test_blocks_that_are_equal_have_no_trend(blocks: Blocks) -> None:
    assert trend(blocks) == Trend(0.0, 1.0)


def test_one_bad_block_makes_no_trend() -> None:
    blocks = [[10.0 + 0.01 * (block % 3)] for block in range(12)]
    blocks[-1] = [400.0]
    assert abs(trend(blocks).change) < 0.005
    assert trend(blocks).p_value > 0.05


@pytest.mark.parametrize("change", [0.1, -0.1])
def test_a_drift_is_detected_and_noise_is_not(change: float) -> None:
    steady = [trend(simulated_samples(seed).tolist()).p_value for seed in range(300)]
    assert sum(p_value < 0.01 for p_value in steady) <= AT_MOST_3_IN_100
    ramp = np.exp(np.linspace(0, math.log1p(change), 17))[:, None]
    found = [trend((simulated_samples(seed) * ramp).tolist()) for seed in range(100)]
    assert sum(each.p_value < 0.01 for each in found) >= 95
    # Its size too: Theil's and Sen's slope has a standard error of 1.6 % here.
    assert np.mean([each.change for each in found]) == pytest.approx(change, abs=0.01)


@pytest.mark.parametrize("ratio", [1.2, 0.8], ids=["slower", "faster"])
def test_the_blocks_before_it_settled_are_counted(ratio: float) -> None:
    blocks = [[40.0 + 0.1 * (block % 3)] * 3 for block in range(20)]
    blocks[:4] = [[40.0 * ratio]] * 4
    found = settling(blocks)
    assert found.blocks == 4
    # 1e-12: the settled half is at 40.1.
    assert found.ratio == pytest.approx(40 * ratio / 40.1, rel=1e-12)


@pytest.mark.parametrize(
    "beginning",
    [[40.0] * 3, [41.9] * 3, [40.0, 50.0, 50.0], [], [40.0]],
    ids=["like the rest", "within 5 %", "later", "nothing", "one block"],
)
def test_what_begins_like_the_rest_is_settled(beginning: list[float]) -> None:
    blocks = [[each] for each in beginning] + [[40.0]] * (10 if len(beginning) != 1 else 0)
    assert settling(blocks) == Settling(0, 1.0)


def test_only_one_side_counts_as_the_beginning() -> None:
    assert settling([[50.0], [50.0], [30.0], *[[40.0]] * 7]) == Settling(2, 50 / 40)


def test_a_short_warm_up_is_detected_and_noise_is_not() -> None:
    steady = [settling(simulated_samples(seed).tolist()).blocks >= 2 for seed in range(300)]
    assert sum(steady) <= AT_MOST_3_IN_100
    warming = np.exp(0.3 * np.exp(-np.arange(17) / 3))[:, None]
    found = [settling((simulated_samples(seed) * warming).tolist()) for seed in range(100)]
    assert sum(each.blocks >= 2 for each in found) >= 95


def test_the_spread_of_blocks_is_robust_and_takes_no_drift_for_noise() -> None:
    even = [[10 * 1.02**block] * 3 for block in range(11)]
    # 1e-12: logs of float64 numbers, on a line.
    assert block_spread(even) == pytest.approx(0, abs=1e-12)
    even[5] = [300.0] * 3
    assert block_spread(even) == pytest.approx(0, abs=1e-12)
    assert block_spread([[7.0, 8.0]]) == 0
    found = [block_spread(simulated_samples(seed, 40, 1).tolist()) for seed in range(100)]
    # The noise of a run is 2.5 %. The mean of 100 estimates is good to 2 % of that; a MAD around a
    # line that was fitted to the same 40 blocks comes out some 5 % too small.
    assert np.mean(found) == pytest.approx(0.025, rel=0.1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # By a linear program over all distribution functions with a single mode.
        ([1.0, 2.0, 3.0, 4.0], 1 / 8),  # 1 / 2n: no sample is closer
        ([0.0, 1.0, 4.0, 5.0, 6.0, 8.0, 8.0, 9.0, 10.0, 10.0], 1 / 10),
        ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 1 / 4),
        ([0.0, 1.0, 2.0, 3.0, 20.0, 21.0, 22.0, 23.0], 17 / 80),
    ],
)
def test_dips_known_otherwise(values: list[float], expected: float) -> None:
    # 1e-6: equal values are drawn apart by less than a millionth of the range.
    assert dip(np.array(values)) == pytest.approx(expected, abs=1e-6)
    # Neither place nor scale nor direction matters.
    assert dip(7 + 3 * np.array(values)) == pytest.approx(expected, abs=1e-6)
    assert dip(np.sort(-np.array(values))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [30, 120])
def test_the_limit_of_the_dip_is_exceeded_in_1_of_100_uniform_samples(count: int) -> None:
    random = np.random.default_rng(count)
    trials = 600
    scores = [math.sqrt(count) * dip(np.sort(random.random(count))) for _ in range(trials)]
    # 1 % and three standard deviations of 600 such flips: 0.01 + 3 * 0.0041.
    assert sum(score > DIP_LIMIT for score in scores) <= 0.0222 * trials


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("blocks", "runs"), [(12, 3), (40, 20)])
def test_noise_with_a_single_mode_is_not_taken_for_two(shape: str, blocks: int, runs: int) -> None:
    trials = 60
    found = [modes(simulated_samples(seed, blocks, runs, shape).tolist()) for seed in range(trials)]
    # 1 % at most where the noise is uniform, which these are not: 3 of 60 are three deviations.
    assert sum(each is not None for each in found) <= 3


def test_two_latencies_are_told_apart() -> None:
    samples = simulated_samples(0, 20, 3)
    slow = np.random.default_rng(1).random((20, 3)) < 0.4
    found = modes((samples * np.where(slow, 1.25, 1.0)).tolist())
    assert found is not None
    assert found.slower_share == pytest.approx(
        slow.mean(), abs=0.02
    )  # a run of 60 in the wrong one
    # 1 %: the medians of 24 and 36 runs with 2.5 % of noise have errors of 0.6 and 0.5 %.
    assert found.faster_ms == pytest.approx(40, rel=0.015)
    assert found.slower_ms == pytest.approx(50, rel=0.015)


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_switching_between_two_latencies_is_detected(whole_blocks: bool) -> None:
    found = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        slow = random.random((40, 1 if whole_blocks else 3)) < 0.5
        samples = simulated_samples(seed, 40, 3) * np.where(slow, 1.3, 1.0)
        found += modes(samples.tolist()) is not None
    assert found >= 57  # 95 %


def test_runs_of_one_block_do_not_count_as_independent() -> None:
    # Eight blocks of two latencies could be chance; a thousand runs of each could not.
    values = [40.0, 41.0, 42.0, 43.0, 50.0, 51.0, 52.0, 53.0]
    assert modes([[value] * 1000 for value in values]) is None
    shuffled = np.random.default_rng(0).permutation(np.repeat(values, 1000)).reshape(8, 1000)
    assert modes(shuffled.tolist()) is not None


def test_many_samples_are_thinned_before_their_shape_is_looked_at() -> None:
    samples = simulated_samples(0, 40, 3000)
    assert modes(samples.tolist()) is None
    slow = np.random.default_rng(1).random(samples.shape) < 0.3
    found = modes((samples * np.where(slow, 1.3, 1.0)).tolist())
    assert found is not None
    assert found.slower_share == pytest.approx(0.3, abs=0.005)  # 120,000 flips are good to 0.0013


def test_the_steps_of_a_clock_are_seen() -> None:
    found = resolution([[1.0, 1.5, 1.0], [2.0, 1.5, 1.0]])
    assert found == Resolution(0.5, 3 / 6)
    assert resolution([[2.0, 2.0], [2.0]]) == Resolution(None, 1 / 3)


@pytest.mark.parametrize(
    "look", [outliers, trend, settling, block_spread, modes, resolution], ids=lambda f: f.__name__
)
def test_what_is_no_latency_is_refused_by_all(look: Callable[[Blocks], object]) -> None:
    with pytest.raises(ValueError, match="there is no"):
        look([])
    with pytest.raises(ValueError, match="every sample must be a positive finite number"):
        look([[1.0, 2.0], [1.0, 0.0]])


# --- Distances

INFINITELY_FAR = {
    "relative_l2": math.inf,
    "max_abs_over_max_ref": math.inf,
    "cosine": 0.0,
    "sqnr_db": -math.inf,
}


def test_a_distance_worked_out_by_hand() -> None:
    apart = distance([np.array([3.0, 4.5])], [np.array([3.0, 4.0])])
    # 1e-12: a few roundings of float64. ||ref|| = 5, ||y - ref|| = 0.5, y . ref = 27.
    assert apart.relative_l2 == pytest.approx(0.1, rel=1e-12)
    assert apart.max_abs_over_max_ref == pytest.approx(0.125, rel=1e-12)
    assert apart.cosine == pytest.approx(27 / (5 * math.sqrt(29.25)), rel=1e-12)
    assert apart.sqnr_db == pytest.approx(20.0, rel=1e-12)
    assert apart.nonfinite == 0


def test_outputs_count_together() -> None:
    outputs = [np.array([[3.0]]), np.array([4.0, 0.5])]
    reference = [np.array([[3.0]]), np.array([4.0, 0.0])]
    # 1e-12: as above; each output alone would give 0 and 0.125.
    assert distance(outputs, reference).relative_l2 == pytest.approx(0.1, rel=1e-12)


def test_equal_outputs_are_exact() -> None:
    values = [np.array([1.5, -2.0]), np.array([7])]
    assert distance(values, values) == Distance(0.0, 0.0, 1.0, None, 0)


def test_opposite_outputs_point_the_other_way() -> None:
    apart = distance([np.array([-1.0, -2.0])], [np.array([1.0, 2.0])])
    # 1e-12: a few roundings of float64; the cosine is clipped to -1 on its far side.
    assert apart.cosine == pytest.approx(-1.0, rel=1e-12)
    assert apart.relative_l2 == pytest.approx(2.0, rel=1e-12)


def test_all_zero_outputs_have_no_direction() -> None:
    apart = distance([np.array([0.0, 0.0])], [np.array([1.0, 2.0])])
    assert (apart.relative_l2, apart.cosine, apart.sqnr_db) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_no_scale_over_or_underflows(scale: float) -> None:
    apart = distance([np.array([3.0, 4.5]) * scale], [np.array([3.0, 4.0]) * scale])
    # 1e-12: a few roundings of float64; the squares themselves would be 0 or infinite.
    assert apart.relative_l2 == pytest.approx(0.1, rel=1e-12)
    assert apart.cosine == pytest.approx(27 / (5 * math.sqrt(29.25)), rel=1e-12)


def test_integers_booleans_and_complex_numbers_count_as_float64() -> None:
    apart = distance(
        [np.array([3, 5]), np.array([True, False]), np.array([2 + 1j])],
        [np.array([3, 4]), np.array([True, True]), np.array([2 + 3j])],
    )
    # 1e-12: a few roundings. Differences 1, 1 and 2j; reference 9 + 16 + 1 + 1 + 4 + 9.
    assert apart.relative_l2 == pytest.approx(math.sqrt(6 / 40), rel=1e-12)
    assert distance([np.array([200], np.uint8)], [np.array([1], np.uint8)]).relative_l2 == 199.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_lost_element_puts_the_outputs_infinitely_far_away(bad: float) -> None:
    apart = distance([np.array([1.0, bad, bad])], [np.array([1.0, 2.0, 3.0])])
    assert apart == Distance(**INFINITELY_FAR, nonfinite=2)


@pytest.mark.parametrize("ours", [3.0, -math.inf, math.nan])
def test_an_infinity_that_is_not_reproduced_is_no_small_matter(ours: float) -> None:
    apart = distance([np.array([1.0, ours])], [np.array([1.0, math.inf])])
    assert apart == Distance(**INFINITELY_FAR, nonfinite=0)


def test_the_same_infinities_and_nans_agree() -> None:
    reference = [np.array([3.0, 4.0, -math.inf, math.nan])]
    assert distance(reference, reference) == Distance(0.0, 0.0, 1.0, None, 0)
    apart = distance([np.array([3.0, 4.5, -math.inf, math.nan])], reference)
    # 1e-12: as in the example worked out by hand.
    assert apart.relative_l2 == pytest.approx(0.1, rel=1e-12)
    assert apart.nonfinite == 0


def test_a_reference_of_zeros_is_matched_or_missed() -> None:
    zeros = [np.zeros(3)]
    assert distance(zeros, zeros) == Distance(0.0, 0.0, 1.0, None, 0)
    assert distance([np.array([0.0, 1e-30, 0.0])], zeros) == Distance(**INFINITELY_FAR, nonfinite=0)


def test_outputs_without_elements_are_equal() -> None:
    assert distance([np.empty((0, 4))], [np.empty((0, 4))]) == Distance(0.0, 0.0, 1.0, None, 0)


@pytest.mark.parametrize(
    ("outputs", "reference", "sentence"),
    [
        ([], [], "there is no output to compare"),
        ([np.ones(2)], [np.ones(2), np.ones(2)], "1 outputs cannot be compared with 2"),
        (
            [np.ones(2), np.ones((2, 3))],
            [np.ones(2), np.ones((3, 2))],
            r"output 1 has the shape \(2, 3\), the reference \(3, 2\)",
        ),
        ([np.ones((1, 2))], [np.ones(2)], r"output 0 has the shape \(1, 2\), the reference \(2,\)"),
    ],
)
def test_a_distance_refuses_what_does_not_match(
    outputs: list[np.ndarray], reference: list[np.ndarray], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        distance(outputs, reference)
