"""Measurements, and what the machine did meanwhile -> what makes them doubtful.

Pure: everything it says is derived from the samples and from two snapshots of the machine. A caveat
never changes a number or a verdict; it says what was found, what is likely behind it and what to
try next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from optfuse import stats
from optfuse.environment import Activity
from optfuse.stages import Caveat, Measurement

MACHINE = "this machine"

# What the samples say. Nothing below `stats.LEAST_CHANGE` (5 %) is remarked on.

UNSETTLED_BLOCKS = 2
"""One odd block at the beginning is an interruption, and a trimmed mean leaves it out."""

TREND_P_VALUE = 0.01
"""So that 1 of 100 steady measurements is called drifting at most, before the size is looked at."""

LEAST_MODE_SHARE = 0.1
"""A second latency of fewer runs than that is a matter of outliers."""

OUTLIER_SHARE = 0.05
"""From here on the 95th percentile tells of the interruptions and not of the network."""

OUTLIER_RUNS = 3
"""In 30 runs two are more than 5 %, and heavy-tailed noise makes two now and then."""

LARGE_SPREAD = stats.LEAST_CHANGE - 1
"""With 17 blocks that spread by 5 %, the interval on a ratio is about +-4 % and the noise floor as
far from 1: the change that a verdict promises to find is lost."""

FEWEST_RUNS = 3
"""With three runs a block, its median survives one that was interrupted."""

SHORTEST_RUN_MS = 0.02
"""A call alone takes ONNX Runtime 2 us for a network of one ReLU: a tenth of such a run."""

COARSE_STEP = 0.01
"""A clock whose steps are 1 % of a run cannot show a change of a few percent in a median."""

DISTINCT_SHARE = 0.5
"""Where fewer runs than this differ, it is the clock's steps that they are spread over."""

# Pools of threads that spin.

STALL_RATIO = 5.0
"""A thread that lost its core waits for a time slice or several, many runs long; no other noise
makes a run five times as long as the quickest quarter, again and again."""

STALL_SHARE = 0.01
STALL_RUNS = 2
"""Again and again: of all runs together, and at least."""

SPARE_CORES = 0.25
"""What the main thread and the interpreter may use beside the engine's threads."""

# What the machine did.

LEAST_SECONDS = 1.0
"""The kernel counts in steps of 10 ms: in less than a second they are no percentages."""

BUSY_SHARE = 0.1
"""Of the cores' time, used by others. Below it a scheduler finds them room beside one thread."""

STOLEN_SHARE = 0.01
"""Of the cores' time. It is stolen by the time slice: 1 % is one of 5 ms in every half second."""

QUOTA_SHARE = 0.01
"""Of the time that passed. A thread is stopped until the next period of 100 ms begins."""

SLOW_CLOCK = 0.6
"""Of the highest clock, which is meant for a single core. Many cores on wide vector units run
slower by design, by a third or so; below this it is a setting or a limit."""


def diagnose(
    measurements: Sequence[Measurement],
    before: Activity | None = None,
    after: Activity | None = None,
    *,
    threads: int,
    asked_devices: Mapping[str, str] | None = None,
) -> list[Caveat]:
    """What makes these measurements doubtful, the most important first, each once.

    Where one holds for several measurements, `about` names them all and the figures are the
    worst ones.

    Args:
        measurements: of one run.
        before, after: the machine right before and right after it; None where nobody looked.
        threads: of every engine.
        asked_devices: engine -> the device asked for, as `Measurement.device` has it, or `gpu` for
            any that isn't the CPU. What isn't named may run anywhere.
    """
    caveats = [*_other_devices(measurements, asked_devices or {})]
    stalls = [*_stalls(measurements, threads, None if after is None else after.cores)]
    caveats += stalls
    if before is not None and after is not None:
        caveats += [*_own_load(before, after, threads)] if not stalls else []
        on_gpu = any(each.device != "cpu" for each in measurements)
        caveats += _machine(before, after if on_gpu else replace(after, gpu=None))
    looks = [_look(measurement) for measurement in measurements]
    # Stalls explain whatever else is odd about the samples.
    caveats += [] if stalls else _restless(looks)
    return [*caveats, *_too_little(looks)]


def _other_devices(
    measurements: Sequence[Measurement], asked_devices: Mapping[str, str]
) -> Iterator[Caveat]:
    wrong = []
    for each in measurements:
        asked = asked_devices.get(each.engine, each.device)
        if each.device != asked and (asked != "gpu" or each.device == "cpu"):
            wrong.append((each, asked))
    if wrong:
        first, asked = wrong[0]
        yield Caveat(
            "wrong_device",
            _names([_name(each) for each, _ in wrong], len(measurements)),
            f"It ran on {first.device}, and {asked} was asked for",
            "The engine fell back because a driver or a provider could not be loaded",
            "See what 'optfuse engines' says of it, and leave these figures out until it is mended",
        )


def _stalls(
    measurements: Sequence[Measurement], threads: int, cores: int | None
) -> Iterator[Caveat]:
    """Runs that took many times as long as the others, where every core has a thread that spins."""
    on_cpu = [each for each in measurements if each.device == "cpu"]
    if threads == 1 or (cores is not None and threads < cores) or not on_cpu:
        return
    stalled = {}
    for each in on_cpu:
        # The quickest quarter: more than half of the runs may stall.
        limit_ms = STALL_RATIO * float(np.quantile(each.samples_ms, 0.25))
        stalled[_name(each)] = [sample for sample in each.samples_ms if sample > limit_ms]
    slow = [sample for samples in stalled.values() for sample in samples]
    share = len(slow) / sum(len(each.samples_ms) for each in on_cpu)
    if share >= STALL_SHARE and len(slow) >= STALL_RUNS:
        yield Caveat(
            "spinning",
            _names([name for name, samples in stalled.items() if samples], len(measurements)),
            f"{_percent(share)} of the runs took more than {STALL_RATIO:.0f} times as long as the "
            f"others, up to {_ms(max(slow))}",
            f"An engine's {threads} threads wait for each other by spinning, and one that loses "
            "its core to another thread holds up all of them",
            "Measure with --threads 1, or each in a process of its own with "
            "'optfuse bench --isolated'",
        )


def _own_load(before: Activity, after: Activity, threads: int) -> Iterator[Caveat]:
    seconds = after.taken_seconds - before.taken_seconds
    used = after.own_seconds - before.own_seconds
    if seconds >= LEAST_SECONDS and used / seconds > threads + SPARE_CORES:
        count = "1 thread" if threads == 1 else f"{threads} threads"
        yield Caveat(
            "spinning",
            MACHINE,
            f"optfuse kept {used / seconds:.1f} cores busy, and each engine was given {count}",
            "The thread pools of the engines that were waiting for their turn spun meanwhile",
            "Measure one engine at a time, or each in a process of its own with "
            "'optfuse bench --isolated'",
        )


def _machine(before: Activity, after: Activity) -> Iterator[Caveat]:
    """What held the machine up, or somebody else used of it."""
    seconds = after.taken_seconds - before.taken_seconds
    yield from _limits(before, after)
    if seconds < LEAST_SECONDS:
        return
    held = _grown(before.quota_seconds, after.quota_seconds)
    if held is not None and held >= QUOTA_SHARE * seconds:
        yield Caveat(
            "quota",
            MACHINE,
            f"The container's CPU quota kept it from running for {held:.1f} s of {seconds:.0f} s",
            "More threads wanted to run than the quota has time for",
            "Give the container more CPU time, or measure with fewer --threads",
        )
    stolen = _grown(before.stolen_seconds, after.stolen_seconds)
    if stolen is not None and stolen >= STOLEN_SHARE * after.cores * seconds:
        yield Caveat(
            "stolen_time",
            MACHINE,
            f"The hypervisor took {_percent(stolen / (after.cores * seconds))} of the cores' time "
            "away",
            "Other virtual machines on the same host were busy",
            "Measure again at another time, or on a machine that is not shared",
        )
    others = _others_seconds(before, after)
    if others is not None and others >= BUSY_SHARE * after.cores * seconds:
        yield Caveat(
            "busy",
            MACHINE,
            f"Other processes used {others / seconds:.1f} of its {_count(after.cores, 'core')} "
            "meanwhile",
            "Something else was running, and took cores, caches and memory bandwidth from it",
            "Stop what else is running, and measure again",
        )


def _limits(before: Activity, after: Activity) -> Iterator[Caveat]:
    """Heat, power and clocks."""
    if (_grown(before.throttle_events, after.throttle_events) or 0) > 0:
        yield Caveat(
            "throttled",
            MACHINE,
            "The processor ran into its thermal limit",
            "It got too hot to keep its clock up",
            "Let it cool down, or cool it better, and measure again",
        )
    if after.gpu is not None and after.gpu.held_by:
        yield Caveat(
            "throttled",
            "the GPU",
            f"Its clock was held down by {' and '.join(after.gpu.held_by)}",
            "It got too hot, or drew more power than it may",
            "See what 'nvidia-smi -q -d PERFORMANCE' says, and measure again when it is cool",
        )
    for about, now, top in _clocks(after):
        if now < SLOW_CLOCK * top:
            yield Caveat(
                "slow_clock",
                about,
                f"Its clock was at {now / 1000:.1f} GHz of {top / 1000:.1f} GHz",
                "A power-saving setting or a limit of power or heat keeps it down",
                "Set the frequency governor to 'performance', or lock the GPU's clock, and measure "
                "again",
            )


def _clocks(after: Activity) -> Iterator[tuple[str, float, float]]:
    """(about, MHz now, MHz at most): of the core that is closest to its highest clock, because the
    others may be idle, and of a GPU that isn't."""
    pairs = zip(after.clocks_mhz or (), after.top_clocks_mhz or (), strict=False)
    cores = [(now, top) for now, top in pairs if top > 0]
    if cores:
        yield (MACHINE, *max(cores, key=lambda clock: clock[0] / clock[1]))
    gpu = after.gpu
    if gpu is not None and not gpu.idle and gpu.clock_mhz and gpu.top_clock_mhz:
        yield "the GPU", gpu.clock_mhz, gpu.top_clock_mhz


@dataclass(frozen=True)
class _Look:
    """What there is to say of one measurement's samples.

    Attributes:
        name: of the measurement.
        blocks: all of them.
        start: the blocks at the beginning that belong to the warm-up; none where it is a trend
            that goes on after them.
        rest: the blocks after them, which all the rest is about.
        drift: the trend of the rest, or None where it is none.
        modes: the two latencies it switches between, or None.
        outliers: of the rest.
        resolution: of all blocks.
        runs: in a block, typically.
        typical_ms: the median of all runs.
    """

    name: str
    blocks: Sequence[Sequence[float]]
    start: stats.Settling
    rest: Sequence[Sequence[float]]
    drift: stats.Trend | None
    modes: stats.Modes | None
    outliers: stats.Outliers
    resolution: stats.Resolution
    runs: int
    typical_ms: float


def _look(measurement: Measurement) -> _Look:
    blocks = measurement.blocks
    start = stats.settling(blocks)
    settled = start.blocks if start.blocks >= UNSETTLED_BLOCKS else 0
    drift = _trend(blocks[settled:])
    if settled and drift is not None and (drift.change < 0) == (start.ratio > 1):
        settled, drift = 0, _trend(blocks)  # it began that way and went on
    rest = blocks[settled:]
    # Two levels, one after the other, are a trend.
    modes = _modes(rest) if drift is None else None
    return _Look(
        name=_name(measurement),
        blocks=blocks,
        start=start if settled else stats.Settling(0, 1.0),
        rest=rest,
        drift=drift,
        modes=modes,
        outliers=stats.outliers(rest),
        resolution=stats.resolution(blocks),
        runs=int(median(map(len, blocks))),
        typical_ms=median(measurement.samples_ms),
    )


def _trend(blocks: Sequence[Sequence[float]]) -> stats.Trend | None:
    found = stats.trend(blocks)
    large = abs(found.change) >= stats.LEAST_CHANGE - 1
    return found if large and found.p_value <= TREND_P_VALUE else None


def _modes(blocks: Sequence[Sequence[float]]) -> stats.Modes | None:
    found = stats.modes(blocks)
    if found is None or found.slower_ms < stats.LEAST_CHANGE * found.faster_ms:
        return None
    return found if LEAST_MODE_SHARE <= found.slower_share <= 1 - LEAST_MODE_SHARE else None


def _restless(looks: Sequence[_Look]) -> Iterator[Caveat]:
    """Samples that are not all of one kind."""
    unsettled = [look for look in looks if look.start.blocks]
    if unsettled:
        worst = max(unsettled, key=lambda look: max(look.start.ratio, 1 / look.start.ratio))
        yield Caveat(
            "not_settled",
            _about(unsettled, looks),
            f"The first {worst.start.blocks} of {len(worst.blocks)} blocks took "
            f"{_longer(worst.start.ratio)} the second half of the run",
            "The warm-up was too short for the clocks, caches or thread pools to settle",
            "Measure longer with --duration, or warm up longer with 'optfuse bench --warmup'",
        )
    drifting = [(look, look.drift) for look in looks if look.drift is not None]
    if drifting:
        worst_drift = max((drift for _, drift in drifting), key=lambda drift: abs(drift.change))
        yield Caveat(
            "trend",
            _about([look for look, _ in drifting], looks),
            f"At the end a run took {_longer(1 + worst_drift.change)} at the beginning",
            "The clock changes with heat, or other load comes or goes",
            "Trust the ratios, where a drift of all cancels, rather than the medians"
            if len(drifting) == len(looks) > 1
            else "Measure again on a quiet machine; a drift of one alone is in its ratio too",
        )
    switching = [(look, look.modes) for look in looks if look.modes is not None]
    if switching:
        widest = max((modes for _, modes in switching), key=lambda m: m.slower_ms / m.faster_ms)
        yield Caveat(
            "bimodal",
            _about([look for look, _ in switching], looks),
            f"It has two latencies: {_percent(1 - widest.slower_share)} of the runs took about "
            f"{_ms(widest.faster_ms)} and {_percent(widest.slower_share)} about "
            f"{_ms(widest.slower_ms)}",
            "The clock has two levels, cores differ in speed, or threads get in each other's way",
            "Measure with --threads 1 and pinned to one kind of core, for example with 'taskset'",
        )
    yield from _noisy(looks)


def _noisy(looks: Sequence[_Look]) -> Iterator[Caveat]:
    """Samples of one kind that scatter. Those with two latencies scatter for a reason that is
    named already."""
    single = [look for look in looks if look.modes is None]
    spread = {look.name: stats.block_spread(look.rest) for look in single}
    loud = [look for look in single if spread[look.name] > LARGE_SPREAD]
    if loud:
        yield Caveat(
            "noise",
            _about(loud, looks),
            f"Its blocks scatter by {_percent(max(spread[look.name] for look in loud))}",
            "Something takes time from it now and then, which a small change drowns in",
            "Stop what else is running, and measure longer with --duration",
        )
    hit = [look for look in single if _interrupted(look)]
    if hit:
        worst = max(hit, key=lambda look: look.outliers.share)
        yield Caveat(
            "outliers",
            _about(hit, looks),
            f"{_percent(worst.outliers.share)} of the runs took more than "
            f"{_ms(worst.outliers.limit_ms)}, the slowest {_ms(worst.outliers.slowest_ms)}",
            "Other processes or interrupts held them up",
            "Trust the median rather than the mean and the highest percentiles, or measure again "
            "on a quiet machine",
        )


def _interrupted(look: _Look) -> bool:
    runs = look.outliers.share * sum(map(len, look.rest))
    return look.outliers.share > OUTLIER_SHARE and round(runs) >= OUTLIER_RUNS


def _too_little(looks: Sequence[_Look]) -> Iterator[Caveat]:
    """Too few runs, too short ones, or a clock too coarse for them."""
    few = [look for look in looks if look.runs < FEWEST_RUNS]
    if few:
        yield Caveat(
            "few_runs",
            _about(few, looks),
            f"Each block has {_count(min(look.runs for look in few), 'run')}, and one that is "
            "interrupted spoils the block",
            "A run takes long for the time that was given to all of them",
            "Measure longer with --duration",
        )
    short = [look for look in looks if look.typical_ms < SHORTEST_RUN_MS]
    if short:
        yield Caveat(
            "short",
            _about(short, looks),
            f"A run takes {_ms(min(look.typical_ms for look in short))}",
            "Calling an engine from Python takes microseconds by itself, which are part of that",
            "Compare them on larger inputs, for example with 'optfuse bench --batch'",
        )
    coarse = [look for look in looks if _coarse(look)]
    if coarse:
        steps = [look.resolution.step_ms for look in coarse]
        yield Caveat(
            "resolution",
            _about(coarse, looks),
            "All runs took exactly the same time"
            if None in steps
            else f"Latencies come in steps of {_ms(max(step for step in steps if step))}",
            "The clock of this system is too coarse for runs as short as these",
            "Compare them on larger inputs, for example with 'optfuse bench --batch'",
        )


def _coarse(look: _Look) -> bool:
    step_ms = look.resolution.step_ms
    coarse = step_ms is None or step_ms >= COARSE_STEP * look.typical_ms
    return coarse and look.resolution.distinct < DISTINCT_SHARE


def _others_seconds(before: Activity, after: Activity) -> float | None:
    """Core-seconds that other processes used in between."""
    user = _grown(before.user_seconds, after.user_seconds)
    system = _grown(before.system_seconds, after.system_seconds)
    if user is None or system is None:
        return None
    return user + system - (after.own_seconds - before.own_seconds)


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _name(measurement: Measurement) -> str:
    return f"{measurement.engine} {measurement.variant}"


def _about(some: Sequence[_Look], looks: Sequence[_Look]) -> str:
    return _names([look.name for look in some], len(looks))


def _names(some: Sequence[str], of: int) -> str:
    return "every measurement" if len(some) == of > 1 else ", ".join(some)


def _count(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:.0f} ms"


def _longer(ratio: float) -> str:
    """How long something takes beside something else, e.g. `12% longer than`."""
    if ratio >= 2:
        return f"{ratio:.1f} times as long as"
    return f"{_percent(abs(ratio - 1))} {'longer' if ratio > 1 else 'less'} than"
