"""Which engine and which file to deploy, from what was measured: what `--engine auto` answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optfuse import stats
from optfuse.stages import Drift, Measurement


@dataclass(frozen=True)
class Candidate:
    """One file on one engine, and how it stands to the fastest.

    Attributes:
        engine, variant: what ran.
        median_ms: of its runs.
        relative_l2: its drift, or None where it was not taken.
        behind: how many times as fast the fastest is, paired; None for the fastest itself, and
            where the two did not run side by side.
        verdict: whether it is slower than the fastest: `fastest`, `slower`, `undecided`, or
            `unpaired` where they did not run side by side.
    """

    engine: str
    variant: str
    median_ms: float
    relative_l2: float | None
    behind: stats.Ratio | None
    verdict: str


@dataclass(frozen=True)
class Recommendation:
    """What to deploy, and why.

    Attributes:
        engine, variant: the choice.
        reason: why, in one sentence or two.
        candidates: everything that was measured, the fastest first.
    """

    engine: str
    variant: str
    reason: str
    candidates: tuple[Candidate, ...]


def recommend(
    measurements: Sequence[Measurement],
    drifts: Sequence[Drift],
    interleaved: Sequence[Sequence[str]],
    *,
    seed: int,
) -> Recommendation | None:
    """The fastest that gives finite outputs; of those that cannot be told from it, the one with the
    least drift.

    Args:
        measurements: of every file on every engine, the control included, at the same shapes.
        drifts: of the same.
        interleaved: the engines by the runs that they were measured in.
        seed: of the resampling.

    Returns:
        None where nothing that could be deployed was measured.
    """
    distance = {(each.engine, each.variant): each for each in drifts}
    standing = [
        each
        for each in measurements
        if each.variant != "control"
        and not ((found := distance.get((each.engine, each.variant))) and found.nonfinite)
    ]
    if not standing:
        return None
    standing.sort(key=lambda each: stats.summarise(each.samples_ms).median_ms)
    fastest = standing[0]
    floors = _floors(measurements, seed)
    group = {engine: number for number, engines in enumerate(interleaved) for engine in engines}
    candidates = []
    for each in standing:
        behind, verdict = None, "fastest"
        if each is not fastest:
            verdict = "unpaired"
            if group.get(each.engine) == group.get(fastest.engine):
                behind = stats.paired_ratio(each.blocks, fastest.blocks, seed=seed)
                floor = max(floors.get(each.engine, 1.0), floors.get(fastest.engine, 1.0))
                decided = stats.verdict(behind, floor) == "faster"
                verdict = "slower" if decided else "undecided"
        drift = distance.get((each.engine, each.variant))
        candidates.append(
            Candidate(
                each.engine,
                each.variant,
                stats.summarise(each.samples_ms).median_ms,
                None if drift is None else drift.relative_l2,
                behind,
                verdict,
            )
        )
    return _chosen(candidates)


def _floors(measurements: Sequence[Measurement], seed: int) -> dict[str, float]:
    """The noise floor of each engine that has a control."""
    blocks = {(each.engine, each.variant): each.blocks for each in measurements}
    return {
        engine: stats.noise_floor(stats.paired_ratio(found, blocks[engine, "control"], seed=seed))
        for (engine, variant), found in blocks.items()
        if variant == "baseline" and (engine, "control") in blocks
    }


def _chosen(candidates: Sequence[Candidate]) -> Recommendation:
    fastest = candidates[0]
    level = [each for each in candidates if each.verdict in ("fastest", "undecided")]
    best = min(level, key=_drift_first)
    reason = f"It is the fastest here: {best.median_ms:.3g} ms."
    if best is not fastest:
        reason = (
            f"It cannot be told from the fastest, {_name(fastest)}, and has less drift: "
            f"{best.median_ms:.3g} ms."
        )
    elif len(level) > 1:
        others = ", ".join(_name(each) for each in level[1:])
        reason += f" It cannot be told from {others}."
    behind = next((each for each in candidates if each.verdict == "slower"), None)
    if behind is not None and behind.behind is not None:
        ratio = behind.behind
        reason += (
            f" {_name(fastest)} is {ratio.ratio:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] as fast "
            f"as the next, {_name(behind)}."
        )
    if any(each.verdict == "unpaired" for each in candidates):
        reason += " The engines took turns, so medians of different runs are compared."
    return Recommendation(best.engine, best.variant, reason, tuple(candidates))


def _drift_first(each: Candidate) -> tuple[float, float]:
    return (float("inf") if each.relative_l2 is None else each.relative_l2, each.median_ms)


def _name(each: Candidate) -> str:
    return f"{each.engine} {'as exported' if each.variant == 'baseline' else each.variant}"
