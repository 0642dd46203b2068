"""The statistics against known answers: by hand, and by simulation where the truth is chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optfuse.stats import (
    MINIMUM_BLOCKS,
    Distance,
    Ratio,
    distance,
    noise_floor,
    paired_ratio,
    summarise,
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
