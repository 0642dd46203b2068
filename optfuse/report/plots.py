"""What is drawn: every plot of the report, each for a wide page and for a phone.

A drawing function takes its width in CSS pixels and plain numbers, and gives a matplotlib figure;
`frames` says where things stand in it. matplotlib is imported inside functions, so that nothing
else waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optfuse.report import svg
from optfuse.report.frames import (
    CHARACTER,
    ROW,
    Grid,
    Line,
    Rows,
    legend,
    legend_height,
    log_axis,
    name_places,
    number_axis,
    placed,
    ratio_axis,
    shortened,
    some_ticks,
    value_axis,
)
from optfuse.report.table import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 1072.0
NARROW = 344.0
MOST_DOTS = 400
"""How many runs of a variant are drawn as dots."""

_MOST_MARKS = 200
"""A line of more points than this has no marks on it: they would touch."""

_COLORS = (svg.OURS, svg.SECOND, svg.THIRD, svg.THEIRS)
_MARKERS = ("o", "s", "^", "D", "v", "P")

_STANDINGS = {
    "within it": ("o", svg.OURS, svg.OURS),
    "beyond it": ("o", svg.ALARM, svg.PAPER),
    "infinite": ("^", svg.ALARM, svg.ALARM),
}
"""How a drift stands to its limit -> marker, color, and what it is filled with."""


@dataclass(frozen=True)
class Stage:
    """A pass and how many operators there are before and after it."""

    label: str
    before: int
    after: int


@dataclass(frozen=True)
class Gain:
    """How many times as fast something is, with its interval.

    Attributes:
        ratio, low, high: above 1 is faster; None where unknown.
        floor: the noise floor, at least 1, or None.
        note: a few characters beside it.
        hollow: drawn as an outline, to tell it from the others.
    """

    ratio: float | None
    low: float | None
    high: float | None
    floor: float | None = None
    note: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a plot: a name, and what is drawn beside it, one thing below the other."""

    label: str
    gains: Sequence[Gain]


@dataclass(frozen=True)
class Runs:
    """Every run of one variant, in the order they were taken.

    Attributes:
        label: which variant.
        samples_ms: raw samples, not empty.
        ours: whether it is the one the page is about.
    """

    label: str
    samples_ms: Sequence[float]
    ours: bool = False


@dataclass(frozen=True)
class Mixture:
    """A set of layers in low precision, as it was measured.

    Attributes:
        share: of all layers, from 0 to 1.
        drift: relative L2, not negative; None where it is infinite.
        ratio: how many times as fast as with no layer low; None where it was not timed.
        within: whether the drift is within the limit.
        name: where it is the chosen one; empty for all others.
    """

    share: float
    drift: float | None
    ratio: float | None
    within: bool
    name: str = ""

    @property
    def standing(self) -> str:
        """One of `_STANDINGS`."""
        return "within it" if self.within else "infinite" if self.drift is None else "beyond it"


def waterfall(
    width: float, stages: Sequence[Stage], panels: Mapping[str, Sequence[Gain | None]]
) -> Figure:
    """Operators after each pass, and beside them how fast each engine is after it.

    Args:
        width: CSS pixels.
        stages: in the order they ran, at least one.
        panels: an engine -> one for each stage, None where it was not measured.
    """
    changes = [_change(stage) for stage in stages]
    layout = Rows(
        width,
        [stage.label for stage in stages],
        panels=1 + len(panels),
        gutter=_gutter([*changes, *(each.note for row in panels.values() for each in row if each)]),
        heading=True,
    )
    figure = svg.figure(width, layout.height)
    axes = layout.axes(figure, 0, "operators")
    most = max(max(stage.before, stage.after) for stage in stages) or 1
    axes.set_xlim(0, most * 1.4 if layout.phone else most)
    axes.set_xticks([])
    for row, stage in enumerate(stages):
        low, high = sorted((stage.before, stage.after))
        y = layout.y(row)
        axes.barh(y, low, layout.thickness, color=svg.BAND)
        if high > low:
            color = svg.OURS if stage.after < stage.before else svg.ALARM
            axes.barh(y, high - low, layout.thickness, left=low, color=color)
        axes.annotate(
            changes[row], (high, y), (7, 0), textcoords="offset points", ha="left",
            va="center", color=svg.INK, annotation_clip=False,
        )  # fmt: skip
    for number, (engine, gains) in enumerate(panels.items(), start=1):
        heading = shortened(f"{engine}, times as fast", int(layout.room / CHARACTER))
        axes = layout.axes(figure, number, heading)
        _gains(axes, layout, [[gain] if gain else [] for gain in gains])
    return figure


def forest(width: float, lines: Sequence[Row]) -> Figure:
    """Ratios with their intervals, each over the band of its noise floor."""
    most = max(len(line.gains) for line in lines)
    layout = Rows(
        width,
        [line.label for line in lines],
        gutter=_gutter([gain.note for line in lines for gain in line.gains]),
        row=ROW + 16 * (most - 1),
    )
    figure = svg.figure(width, layout.height)
    _gains(layout.axes(figure, 0), layout, [line.gains for line in lines])
    return figure


def runs(width: float, variants: Sequence[Runs]) -> Figure:
    """Every run as a dot, its latency to the right and its turn downwards, with the median.

    Where there are very many runs, the slowest and the fastest of them are drawn all the same. A
    run far beyond all others is counted at the edge, or it would press everything else together.
    """
    layout = Rows(width, [_with_median(each) for each in variants], row=58.0)
    figure = svg.figure(width, layout.height)
    axes = layout.axes(figure, 0)
    low, high = _span([each.samples_ms for each in variants])
    axes.set_xlim(low - 0.03 * (high - low), high + 0.08 * (high - low))
    for row, each in enumerate(variants):
        color = svg.OURS if each.ours else svg.THEIRS
        y, half = layout.y(row), layout.thickness * 0.5
        axes.barh(y, high - low, 2 * half, left=low, color=svg.BAND, zorder=0)
        dots = _thinned(each.samples_ms)
        last = max(len(each.samples_ms) - 1, 1)
        seen = [(x, y + half * (1.8 * turn / last - 0.9)) for turn, x in dots if x <= high]
        # A line of no length with round ends is a dot, and a third as long in the file.
        segments = [
            point for x, at in seen for point in ((x, at), (x + 1e-9 * high, at), (math.nan, at))
        ]
        axes.plot(
            *zip(*segments, strict=True), color=color, linewidth=5 if len(dots) < 200 else 4,
            solid_capstyle="round", alpha=0.75,
        )  # fmt: skip
        median = quantile(each.samples_ms, 0.5)
        axes.plot([median, median], [y - half, y + half], color=svg.INK, linewidth=2)
        beyond = sum(sample > high for sample in each.samples_ms)
        if beyond:
            worst = significant(max(each.samples_ms), 3)
            text = f"+{beyond} up to {worst} ms \N{RIGHTWARDS ARROW}"
            axes.text(high, y, text, ha="right", va="center", color=svg.INK)
    number_axis(axes, "ms a run")
    return figure


def layers(
    width: float,
    names: Sequence[str],
    ours: Sequence[float | None],
    own: Sequence[float | None],
    suspect: int | None,
    labels: tuple[str, str] = ("optimized", "as captured"),
) -> Figure:
    """The error after every layer, in the order they run, on a logarithmic scale.

    Args:
        width: CSS pixels.
        names: of the layers.
        ours: relative L2 of each; None where it is infinite.
        own: what the unchanged program in its own precision has there; None where unknown.
        suspect: the place of the first layer to drift, or None.
        labels: what the two are called.
    """
    endless = [place for place, value in enumerate(ours) if value is None]
    top = 14 + legend_height((*labels, *(["infinite"] if endless else [])), width - 90)
    figure = svg.figure(width, top + 290)
    axes = placed(figure, 70, top, width - 90, 240)
    floor, ceiling = _logarithmic(axes, (*ours, *own))
    axes.set_xlim(-0.5, max(len(names) - 0.5, 0.5))
    places = range(len(names))
    # Where the two are the same, the wider one shows behind the other.
    for values, color, label, size, order in (
        (ours, svg.OURS, labels[0], 1.4, 3),
        (own, svg.THEIRS, labels[1], 3.6, 2),
    ):
        shown = [
            (place, min(max(value, floor), ceiling))
            for place, value in zip(places, values, strict=True)
            if value is not None
        ]
        if shown:
            axes.plot(
                *zip(*shown, strict=True), color=color, label=label, linewidth=size,
                marker="o" if len(names) <= _MOST_MARKS else "", markersize=size + 3,
                clip_on=False, zorder=order,
            )  # fmt: skip
    if endless:
        axes.plot(
            endless, [ceiling] * len(endless), color=svg.ALARM, linestyle="none", marker="^",
            markersize=8, clip_on=False, label="infinite",
        )  # fmt: skip
    if suspect is not None:
        _ring(axes, suspect, ours[suspect] or ceiling, names[suspect])
    log_axis(axes)
    name_places(axes, names, width)
    legend(axes)
    return figure


def mixtures(width: float, points: Sequence[Mixture], limit: float, low: str) -> Figure:
    """The drift of mixed precisions over the share of layers that are low, on a logarithmic scale,
    and below it how fast those are that were timed.

    Args:
        width: CSS pixels.
        points: by their shares, at least one.
        limit: of the drift, relative L2.
        low: the low precision.
    """
    timed = [point for point in points if point.ratio is not None]
    standings = {point.standing for point in points}
    entries = [f"limit {limit:g}", *(each for each in _STANDINGS if each in standings)]
    room, high, gap, low_panel = width - 90, 240.0, 48.0, 130.0
    top = 24 + legend_height(entries, room)
    figure = svg.figure(width, top + high + (gap + low_panel if timed else 0) + 50)
    axes = placed(figure, 70, top, room, high)
    floor, ceiling = _logarithmic(axes, [limit, *(point.drift for point in points)])
    # Below the lowest point there is room for its name, and above the highest.
    axes.set_ylim(floor / (ceiling / floor) ** 0.15, ceiling * (ceiling / floor) ** 0.08)
    drifts = [
        ceiling if point.drift is None else min(max(point.drift, floor), ceiling)
        for point in points
    ]
    axes.axhline(limit, color=svg.INK, linewidth=1.4, linestyle=(0, (5, 3)), label=entries[0])
    _mixtures(axes, points, drifts)
    for point, drift in zip(points, drifts, strict=True):
        if point.name:
            _name_mixture(axes, point, drift, room)
    log_axis(axes)
    legend(axes)
    _head(axes, "drift, relative L2", top - 20)
    if timed:
        axes.set_xticks([])
        axes = placed(figure, 70, top + high + gap, room, low_panel)
        axes.axhline(1, color=svg.MUTED, linewidth=1, zorder=1)
        _mixtures(axes, timed, [point.ratio or math.nan for point in timed])
        value_axis(axes, "{x:g}x")
        _head(axes, f"times as fast as with none in {low}", 10)
    number_axis(axes, f"% of the layers in {low}")
    return figure


def trend(
    width: float,
    places: Sequence[str],
    latencies: Sequence[Line],
    speedup: Line,
    floors: Sequence[float],
) -> Figure:
    """One model on one engine, report after report: its latency, and its speed-up.

    Args:
        width: CSS pixels.
        places: one label for each report, of one or two lines.
        latencies: milliseconds.
        speedup: times as fast as what it is compared with.
        floors: the noise floor of each report, at least 1.
    """
    panels = {"median latency, ms": latencies, "times as fast": [speedup]}
    grid = Grid(width, {title: lines for title, lines in panels.items() if _known(lines)}, below=56)
    for axes, lines in grid.panels():
        _series(axes, range(len(places)), lines)
        if lines[0] is speedup:
            bottoms = [1 / floor for floor in floors]
            heights = [floor - 1 / floor for floor in floors]
            axes.bar(range(len(places)), heights, 0.5, bottoms, color=svg.BAND, zorder=0)
            axes.axhline(1, color=svg.MUTED, linewidth=1, zorder=1)
        axes.set_xlim(-0.4, len(places) - 0.6)
        some_ticks(axes, places, grid.room)
        value_axis(axes, "{x:g}x" if lines[0] is speedup else "{x:g}")
        if len(lines) > 1:
            legend(axes)
    return grid.figure


def sweep(width: float, batches: Sequence[int], panels: Mapping[str, Sequence[Line]]) -> Figure:
    """Something over the batch, one panel for each thing."""
    grid = Grid(width, panels, below=60)
    for axes, lines in grid.panels():
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _series(axes, batches, lines)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_xlabel("batch")
        axes.margins(0.08)
        log_axis(axes, lambda value: f"{value:g}")
        legend(axes)
    return grid.figure


def _gains(axes: Axes, layout: Rows, lines: Sequence[Sequence[Gain]]) -> None:
    """Draw ratios into a panel, with a line at 1."""
    ends = [
        end
        for line in lines
        for gain in line
        for end in (gain.ratio, gain.low, gain.high, gain.floor, 1 / (gain.floor or 1))
        if end
    ]
    ratio_axis(axes, min((*ends, 0.99)), max((*ends, 1.01)), layout.room)
    for row, line in enumerate(lines):
        middle, half = layout.y(row), layout.thickness / 2
        reach = half + (0.05 if layout.phone else 0.2)
        # Not across the labels, which stand between the rows on a phone.
        axes.plot([1, 1], [middle - reach, middle + reach], color=svg.MUTED, linewidth=1)
        for number, gain in enumerate(line):
            share = 2 * half / len(line)
            y = middle - half + (number + 0.5) * share
            _gain(axes, gain, y, share)
            layout.write(axes, row, number, y, gain.note)


def _gain(axes: Axes, gain: Gain, y: float, share: float) -> None:
    """One ratio with its interval, over its noise floor."""
    if not gain.ratio:
        return
    if gain.floor and gain.floor > 1:
        left = 1 / gain.floor
        axes.barh(y, gain.floor - left, share, left=left, color=svg.BAND, zorder=0)
    if gain.low and gain.high:
        axes.plot([gain.low, gain.high], [y, y], color=svg.OURS, linewidth=2.4, zorder=3)
    axes.plot(
        [gain.ratio], [y], marker="o", markersize=8, color=svg.OURS, zorder=4,
        markerfacecolor=svg.PAPER if gain.hollow else svg.OURS, markeredgewidth=1.8,
    )  # fmt: skip


def _change(stage: Stage) -> str:
    """How many operators a pass leaves, and how many it took away."""
    moved = stage.after - stage.before
    change = f" ({moved:+d})".replace("-", "\N{MINUS SIGN}") if moved else ""
    return f"{stage.after}{change}"


def _gutter(notes: Iterable[str]) -> float:
    """What the longest note takes."""
    return max(map(len, notes), default=0) * CHARACTER


def _series(axes: Axes, places: Iterable[float], lines: Sequence[Line]) -> None:
    at = list(places)
    others = 0
    for number, line in enumerate(lines):
        if line.kind == "other":
            color, others = _COLORS[others % len(_COLORS)], others + 1
        else:
            color = svg.OURS if line.kind == "ours" else svg.THEIRS
        # A little apart, or one interval would hide the other.
        aside = 0.08 * (number - (len(lines) - 1) / 2)
        for place, low, high in zip(at, line.low, line.high, strict=False):
            if low is not None and high is not None:
                axes.plot([place + aside] * 2, [low, high], color=color, linewidth=2, alpha=0.6)
        shown = [
            (place, value)
            for place, value in zip(at, line.values, strict=True)
            if value is not None
        ]
        if shown:
            axes.plot(
                *zip(*shown, strict=True), color=color, label=line.label, linewidth=1.6,
                marker=_MARKERS[number % len(_MARKERS)], markersize=6,
            )  # fmt: skip


def _logarithmic(axes: Axes, values: Iterable[float | None]) -> tuple[float, float]:
    """Make the vertical axis logarithmic, with room around the values, and give its ends."""
    # It has no place for 0, and the ratio of its ends is a number that can be held.
    positive = [min(max(value, 1e-150), 1e150) for value in values if value]
    floor = min(positive, default=1e-8) / 4
    ceiling = max(positive, default=1e-6) * 4
    axes.set_yscale("log")
    axes.set_ylim(floor, ceiling)
    return floor, ceiling


def _mixtures(axes: Axes, points: Sequence[Mixture], heights: Sequence[float]) -> None:
    """Points over their shares in percent, joined by a line, with a ring around the chosen one."""
    places = [100 * point.share for point in points]
    axes.plot(places, heights, color=svg.THEIRS, linewidth=1.4, clip_on=False)
    for standing, (marker, color, filling) in _STANDINGS.items():
        shown = [
            at
            for *at, point in zip(places, heights, points, strict=True)
            if point.standing == standing
        ]
        if shown:
            axes.plot(
                *zip(*shown, strict=True), color=color, linestyle="none", marker=marker,
                markersize=8, markerfacecolor=filling, markeredgewidth=1.8, clip_on=False,
                label=standing, zorder=3,
            )  # fmt: skip
    for place, height, point in zip(places, heights, points, strict=True):
        if point.name:
            _circle(axes, place, height, svg.INK)
    axes.set_xlim(-3, 103)


def _name_mixture(axes: Axes, point: Mixture, height: float, room: float) -> None:
    """Name a point of a line that rises: below it to the right if the name fits into what `room`
    CSS pixels leave there, else above it to the left."""
    fits = 14 + len(point.name) * CHARACTER < (1 - point.share) * room
    axes.annotate(
        point.name, (100 * point.share, height), (14, -20) if fits else (6, 20),
        textcoords="offset points", ha="left" if fits else "right", va="center", color=svg.INK,
        fontweight="bold", annotation_clip=False,
        bbox={"facecolor": svg.PAPER, "edgecolor": "none", "pad": 1.0},
    )  # fmt: skip


def _head(axes: Axes, text: str, rise: float) -> None:
    """Say above the axes what they show."""
    axes.set_title(text, loc="left", pad=rise, color=svg.MUTED, fontsize=svg.FONT_SIZE)


def _circle(axes: Axes, place: float, value: float, color: str) -> None:
    axes.plot(
        [place], [value], marker="o", markersize=15, markerfacecolor="none", color=color,
        markeredgewidth=2.2, clip_on=False,
    )  # fmt: skip


def _ring(axes: Axes, place: int, value: float, name: str) -> None:
    """Mark one point and name it, on the side where there is room."""
    _circle(axes, place, value, svg.ALARM)
    left, right = axes.get_xlim()
    # An error that grows comes from the lower left: above it there is room, if the name fits.
    early = place - left < (right - left) * 0.3
    axes.annotate(
        shortened(name, 28), (place, value), (-6 if early else -14, 15 if early else 12),
        textcoords="offset points", ha="left" if early else "right", color=svg.ALARM,
        fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def _known(lines: Sequence[Line]) -> bool:
    """Whether there is anything to draw."""
    return any(value is not None for line in lines for value in line.values)


def _with_median(each: Runs) -> str:
    return f"{each.label}, {significant(quantile(each.samples_ms, 0.5), 4)} ms"


def _span(variants: Sequence[Sequence[float]]) -> tuple[float, float]:
    """From the fastest run to the slowest one, or where that is far from the others, to a little
    beyond what at least 98 of 100 runs of every variant take."""
    low = min(min(samples) for samples in variants)
    late = max(sorted(samples)[int(0.98 * (len(samples) - 1))] for samples in variants)
    slowest = max(max(samples) for samples in variants)
    high = min(slowest, late + 0.5 * (late - low))
    return low, high if high > low else low + (0.01 * low or 1.0)


def _thinned(samples: Sequence[float]) -> list[tuple[int, float]]:
    """At most about `MOST_DOTS` runs with their turns: the extremes, and every n-th other one."""
    numbered = list(enumerate(samples))
    if len(numbered) <= MOST_DOTS:
        return numbered
    low, high = quantile(samples, 0.01), quantile(samples, 0.98)
    step = math.ceil(len(numbered) / MOST_DOTS)
    return [
        (turn, sample) for turn, sample in numbered if turn % step == 0 or not low <= sample <= high
    ]


def quantile(samples: Sequence[float], share: float) -> float:
    """The latency that this share of the runs does not exceed, interpolated."""
    import numpy as np

    return float(np.quantile(samples, share))


def both(draw: Callable[[float], Any], ident: str, title: str, description: str) -> tuple[str, str]:
    """One plot as two `<svg>` elements: for a wide page, and for a phone.

    Args:
        draw: one of the functions here, given everything but its width.
        ident: what all ids in it begin with; no other plot of the page may have it.
        title: what it is, in a few words.
        description: what it shows, for who cannot see it.
    """
    with svg.drawing():
        wide = svg.inline(draw(WIDE), f"{ident}-wide", title, description)
        narrow = svg.inline(draw(NARROW), f"{ident}-narrow", title, description)
    return wide, narrow
