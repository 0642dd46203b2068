"""Which layers go low: the most, or the fastest set, whose drift stays within a budget.

Nothing here knows an engine or a dtype. `search` is told the layers and given a callable that
measures the drift with some of them kept high; it serves fp16, bf16 and int8 alike.

1. Each layer's sensitivity: the drift with it alone low.
2. The curve: the drift with the k least sensitive layers low, for several k.
3. A bisection for the largest k within the budget.
4. Single layers beyond that k are tried one by one, as the drift is not exactly a sum.
5. Where times can be taken, the fastest of these and of the first points of the curve, with
   everything high among them.

Layers interact, so the drift is not quite monotone in k: what is returned was itself measured, and
its own drift is within the budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from optfuse.errors import UsageError
from optfuse.stages import Notify, silent

DriftOf = Callable[[Collection[str]], float]
"""Names of the layers that stay high -> relative L2 to the float64 program's outputs."""

TimesOf = Callable[[Sequence[Collection[str]]], Sequence[float]]
"""Several of these -> milliseconds of each, taken in one interleaved run."""

MOST_UNITS = 128
"""How many sensitivities are measured. A network of more layers is parted into so many blocks of
neighbours, each of which goes low as one."""

INNER_POINTS = 5
"""Points of the curve between none low and all low."""

MOST_TRIES = 8
"""Single layers that are tried beyond the largest k."""

LEAST_NOISE = 0.02
"""Times that differ by less are equal, however well the control repeats itself once."""


@dataclass(frozen=True)
class Sensitivity:
    """How much one layer hurts.

    Attributes:
        layers: its name; or those of a block of neighbours where there are too many to try each.
        relative_l2: the drift with it alone low.
    """

    layers: tuple[str, ...]
    relative_l2: float


@dataclass(frozen=True)
class CurvePoint:
    """One set of low layers that was measured.

    Attributes:
        low: how many layers are low.
        share: of all layers.
        relative_l2: the drift.
        within: it is within the budget.
        milliseconds: of a run; None where it was not timed.
    """

    low: int
    share: float
    relative_l2: float
    within: bool
    milliseconds: float | None = None


@dataclass(frozen=True)
class Choice:
    """What the search found.

    Attributes:
        high: the layers that stay high, in the network's order.
        point: the chosen set as it was measured.
        curve: every point with the k least sensitive layers low that was measured, and the largest
            set found, by how many are low. The chosen one is among them.
        sensitivities: the least sensitive first.
        evaluations: how often the drift was measured.
        seconds: wall time.
        reason: why it was chosen, in one sentence without a full stop.
    """

    high: tuple[str, ...]
    point: CurvePoint
    curve: tuple[CurvePoint, ...]
    sensitivities: tuple[Sensitivity, ...]
    evaluations: int
    seconds: float
    reason: str


def most_evaluations(layers: int) -> int:
    """How often `search` measures the drift at most, with so many layers.

    One for each unit, one with all low and one with none; the curve's inner points; the halvings of
    the widest gap between them; and the single tries.
    """
    units = min(layers, MOST_UNITS)
    halvings = math.ceil(math.log2(max(units / (INNER_POINTS + 1) + 1, 2)))
    return units + 2 + INNER_POINTS + halvings + MOST_TRIES


def search(
    layers: Sequence[str],
    drift_of: DriftOf,
    max_drift: float,
    *,
    time_of: TimesOf | None = None,
    notify: Notify = silent,
) -> Choice:
    """Find which layers go low; see the top of this file for how.

    With `time_of`, the even points of the curve that are within the budget and the largest set
    found are timed once, and the set with everything high twice. How far these two are apart, or
    2 % where that is more, is the noise: of all that are no further than that from the fastest, the
    one of the smallest drift is chosen. Without it, the largest set found is.

    Args:
        layers: names of all that could go low, in the network's order.
        drift_of: called at most `most_evaluations(len(layers))` times.
        max_drift: the budget, a relative L2.
        time_of: times several sets side by side.

    Raises:
        UsageError: the budget is no positive number, or there is no layer.
    """
    require_budget(max_drift)
    if not layers:
        raise UsageError(
            "Nothing can go low",
            "The network has no layer that could compute in lower precision",
            "Choose --precision fp32",
        )
    return _Search(layers, drift_of, max_drift, notify).run(time_of)


def require_budget(max_drift: float) -> None:
    """Refuse what is no budget.

    Raises:
        UsageError: it is zero, negative, infinite or no number.
    """
    if not (math.isfinite(max_drift) and max_drift > 0):
        raise UsageError(
            f"--max-drift {max_drift:g} cannot be kept to",
            "It is a relative L2 distance, a positive number",
            "Write it like 0.01; the drift of float32 itself is about 1e-6",
        )


@dataclass(frozen=True)
class _Measured:
    """A set of low layers and its drift."""

    low: frozenset[str]
    drift: float
    within: bool


class _Search:
    def __init__(
        self, layers: Sequence[str], drift_of: DriftOf, max_drift: float, notify: Notify
    ) -> None:
        self._layers = tuple(layers)
        self._drift_of = drift_of
        self._budget = max_drift
        self._notify = notify
        self._begun = time.perf_counter()
        self._known: dict[frozenset[str], _Measured] = {}
        size = math.ceil(len(layers) / MOST_UNITS)
        self._units = [self._layers[start : start + size] for start in range(0, len(layers), size)]

    def run(self, time_of: TimesOf | None) -> Choice:
        """All steps."""
        none = self._measure(())
        sensitivities = self._sensitivities()
        order = [each.layers for each in sensitivities]
        evenly = self._curve(order)
        curve, best = evenly, none
        if none.within:
            curve = self._bisected(order, evenly)
            largest = max(count for count, each in curve.items() if each.within)
            best = self._with_more(curve[largest], order[largest:])
        candidates = [each for each in dict.fromkeys((*evenly.values(), best)) if each.within]
        milliseconds: dict[frozenset[str], float] = {}
        chosen, why = best, self._why_largest(best)
        if none.within and time_of is not None and len(candidates) > 1:
            chosen, why, milliseconds = self._fastest(none, candidates, time_of)
        seen = sorted(
            dict.fromkeys((*curve.values(), best)), key=lambda each: (len(each.low), each.drift)
        )
        return Choice(
            high=tuple(name for name in self._layers if name not in chosen.low),
            point=self._point(chosen, milliseconds),
            curve=tuple(self._point(each, milliseconds) for each in seen),
            sensitivities=sensitivities,
            evaluations=len(self._known),
            seconds=time.perf_counter() - self._begun,
            reason=why,
        )

    def _measure(self, low: Collection[str]) -> _Measured:
        key = frozenset(low)
        if key not in self._known:
            done = len(self._known) / most_evaluations(len(self._layers))
            self._notify(f"Searching: {len(key)} of {len(self._layers)} layers low", min(done, 1.0))
            drift = self._drift_of([name for name in self._layers if name not in key])
            drift = math.inf if math.isnan(drift) else drift
            self._known[key] = _Measured(key, drift, drift <= self._budget)
        return self._known[key]

    def _sensitivities(self) -> tuple[Sensitivity, ...]:
        found = [Sensitivity(unit, self._measure(unit).drift) for unit in self._units]
        # sorted() keeps equals in the network's order.
        return tuple(sorted(found, key=lambda each: each.relative_l2))

    def _curve(self, order: Sequence[Sequence[str]]) -> dict[int, _Measured]:
        """How many units are low -> what was measured, evenly from none to all."""
        parts = INNER_POINTS + 1
        wanted = sorted({round(len(order) * part / parts) for part in range(parts + 1)})
        return {count: self._measure(_joined(order[:count])) for count in wanted}

    def _bisected(
        self, order: Sequence[Sequence[str]], curve: dict[int, _Measured]
    ) -> dict[int, _Measured]:
        """The curve with more points, up to the largest count within the budget."""
        curve = dict(curve)
        inside = max(count for count, each in curve.items() if each.within)
        outside = min((count for count in curve if count > inside), default=inside + 1)
        while outside - inside > 1:
            middle = (inside + outside) // 2
            curve[middle] = self._measure(_joined(order[:middle]))
            if curve[middle].within:
                inside = middle
            else:
                outside = middle
        return curve

    def _with_more(self, best: _Measured, beyond: Sequence[Sequence[str]]) -> _Measured:
        """The set with whichever single layers beyond it still fit, the least sensitive first."""
        # The first alone is what the bisection has just found not to fit, unless it is a block.
        for name in _joined(beyond)[:MOST_TRIES]:
            more = self._measure(best.low | {name})
            best = more if more.within else best
        return best

    def _fastest(
        self, none: _Measured, candidates: Sequence[_Measured], time_of: TimesOf
    ) -> tuple[_Measured, str, dict[frozenset[str], float]]:
        """The one to take, why, and the times of all."""
        self._notify(f"Timing {len(candidates)} candidates", None)
        sets = [none, *(each for each in candidates if each is not none)]
        high = [[name for name in self._layers if name not in each.low] for each in (*sets, none)]
        times = list(time_of(high))
        noise = max(abs(math.log(times[-1] / times[0])), math.log(1 + LEAST_NOISE))
        milliseconds = {each.low: took for each, took in zip(sets, times[:-1], strict=True)}
        least = min(milliseconds.values())
        tied = [each for each in sets if math.log(milliseconds[each.low] / least) <= noise]
        chosen = min(tied, key=lambda each: (each.drift, -len(each.low)))
        ratio = milliseconds[none.low] / milliseconds[chosen.low]
        if chosen is none:
            why = (
                f"Of {len(sets)} candidates within the limit of {self._budget:.2g}, none is faster "
                f"than with every layer high by more than the noise of {math.expm1(noise):.1%}"
            )
        else:
            why = (
                f"With {self._counted(chosen)} it is the fastest of {len(sets)} candidates within "
                f"the limit of {self._budget:.2g}, {ratio:.2f} times as fast as with every layer "
                "high"
            )
        if len(tied) > 1 and chosen is not none:
            why += f", and of {len(tied)} that are equally fast the one that drifts least"
        return chosen, why, milliseconds

    def _why_largest(self, best: _Measured) -> str:
        none = self._measure(())
        if not none.within:
            return (
                f"Every layer stays high: even so the drift is {none.drift:.2g}, above the limit "
                f"of {self._budget:.2g}"
            )
        if not best.low:
            least = min(each.drift for each in self._known.values() if each.low)
            return (
                f"Every layer stays high: the smallest drift seen with any of them low is "
                f"{least:.2g}, above the limit of {self._budget:.2g}"
            )
        within = f"the drift of {best.drift:.2g} is within the limit of {self._budget:.2g}"
        if len(best.low) == len(self._layers):
            return f"Every layer is low: {within}"
        return f"With {self._counted(best)} {within}, and no larger set that was tried is"

    def _counted(self, measured: _Measured) -> str:
        return f"{len(measured.low)} of {len(self._layers)} layers low"

    def _point(self, measured: _Measured, milliseconds: dict[frozenset[str], float]) -> CurvePoint:
        return CurvePoint(
            low=len(measured.low),
            share=len(measured.low) / len(self._layers),
            relative_l2=measured.drift,
            within=measured.within,
            milliseconds=milliseconds.get(measured.low),
        )


def _joined(units: Sequence[Sequence[str]]) -> list[str]:
    return [name for unit in units for name in unit]
