"""Where things stand in a plot: rows with labels, panels of series, axes, ticks and legends.

All places are given in CSS pixels. Below `PHONE` a row's label stands above it, and panels stand
below each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optfuse.report import svg
from optfuse.report.svg import FONT_SIZE
from optfuse.report.table import distance, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHONE = 600.0
"""A plot narrower than this, in CSS pixels, is for a phone."""

CHARACTER = 0.58 * FONT_SIZE
"""About how wide a character is; digits and lower case are narrower."""

ROW = 30.0
_AXIS = 46.0
"""What an axis takes below its plot: ticks, and a line that says what they are."""

_HEADING = 26.0
_LABEL = 21.0
"""What a label takes that stands above its row."""

_GAP = 28.0
_LEGEND_LINE = 21.0
_LEGEND_HANDLE = 44.0
"""What stands before a name in a legend, and the gap after it."""


@dataclass(frozen=True)
class Line:
    """A named series over shared places; None where it has no value.

    Attributes:
        label: what.
        values: one for each place.
        low, high: the interval of each value; empty where there is none.
        kind: `ours` stands out, `theirs` stays back, `other` gets a color of its own.
    """

    label: str
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    kind: Literal["ours", "theirs", "other"] = "other"


class Grid:
    """Panels of series beside each other, on a phone below each other.

    Args:
        width: of the whole plot.
        panels: a heading -> the series below it, at least one.
        below: what an axis takes below its plot.
    """

    def __init__(self, width: float, panels: Mapping[str, Sequence[Line]], below: float) -> None:
        self._panels = panels
        self._side = width >= PHONE
        columns = len(panels) if self._side else 1
        self.room = (width - 78 - 74 * (columns - 1)) / columns
        self._top = _HEADING + max(
            legend_height([line.label for line in lines], self.room) for lines in panels.values()
        )
        self._high = 195.0
        self._whole = self._top + self._high + below
        self.figure = svg.figure(width, self._whole * (1 if self._side else len(panels)))

    def panels(self) -> Iterator[tuple[Axes, Sequence[Line]]]:
        """The axes of each panel with what belongs into it."""
        for number, (heading, lines) in enumerate(self._panels.items()):
            left = 60 + (number * (self.room + 74) if self._side else 0)
            top = self._top + (0 if self._side else number * self._whole)
            axes = placed(self.figure, left, top, self.room, self._high)
            _write_heading(axes, heading, rise=self._top - _HEADING + 4)
            yield axes, lines


class Rows:
    """Where rows with labels stand, in one or several panels, in CSS pixels.

    Args:
        width: of the whole plot.
        labels: one for each row.
        panels: how many there are with the same rows.
        gutter: what is kept free to the right of each panel, for notes.
        row: how high a row is on a wide page.
        heading: whether panels have one.
    """

    def __init__(
        self,
        width: float,
        labels: Sequence[str],
        *,
        panels: int = 1,
        gutter: float = 0.0,
        row: float = ROW,
        heading: bool = False,
    ) -> None:
        self.width = width
        self.phone = width < PHONE
        self.rows = len(labels)
        # More panels than fit side by side stand below each other, as all do on a phone.
        self.columns = panels if panels <= 3 and not self.phone else 1
        # On a phone notes stand above, beside the label.
        self.gutter = 6.0 if self.phone else gutter + 8
        self.bars = row
        self.row = row + (_LABEL if self.phone else 0)
        fitting = int((width * 0.8 if self.phone else width * 0.32) / CHARACTER)
        self.labels = [shortened(label, fitting) for label in labels]
        widest = max((len(label) for label in self.labels), default=0)
        self.left = 6.0 if self.phone else widest * CHARACTER + 18
        free = width - self.left - 6 - _GAP * (self.columns - 1)
        self.room = free / self.columns - self.gutter
        self.top = _HEADING if heading else 8.0
        self.panel_height = self.top + self.rows * self.row + _AXIS
        self.height = math.ceil(panels / self.columns) * self.panel_height

    @property
    def thickness(self) -> float:
        """How much of a row, which counts as 1, its bars take."""
        return (self.bars - 11) / self.row

    @property
    def label_y(self) -> float:
        """Where in its row a label has its middle."""
        return _LABEL * 0.62 / self.row if self.phone else 0.5

    def y(self, row: int) -> float:
        """Where a row's bars have their middle; rows count as 1 and go down from 0."""
        return row + 1 - self.bars / self.row / 2

    def axes(self, figure: Figure, panel: int, heading: str = "") -> Axes:
        """The axes of one panel, with the labels of its rows where they belong."""
        column, line = panel % self.columns, panel // self.columns
        axes = placed(
            figure,
            self.left + column * (self.room + self.gutter + _GAP),
            line * self.panel_height + self.top,
            self.room,
            self.rows * self.row,
        )
        axes.set_ylim(self.rows, 0)
        axes.set_yticks([])
        if heading:
            _write_heading(axes, heading, rise=4)
        if column == 0:
            self._write_labels(axes)
        return axes

    def write(self, axes: Axes, row: int, number: int, y: float, note: str) -> None:
        """Write a note to the right of the thing drawn at `y`; a phone has room for the first of a
        row, beside its label."""
        if self.phone and number:
            return
        at = row + self.label_y if self.phone else y
        axes.annotate(
            note, (1, at), (0 if self.phone else self.gutter, 0),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            va="center", color=svg.MUTED, annotation_clip=False,
        )  # fmt: skip

    def _write_labels(self, axes: Axes) -> None:
        for row, label in enumerate(self.labels):
            axes.annotate(
                label, (0, row + self.label_y), (0 if self.phone else -12, 0),
                xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="left" if self.phone else "right", va="center", color=svg.INK,
                annotation_clip=False,
            )  # fmt: skip


def shortened(text: str, most: int) -> str:
    """The text, its middle left out where it has more than `most` characters."""
    if len(text) <= most:
        return text
    kept = max(most - 1, 2)
    ending = kept // 2
    return f"{text[: kept - ending]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - ending :]}"


def ratio_axis(axes: Axes, low: float, high: float, width: float) -> None:
    """A logarithmic axis for ratios, with ticks at round numbers and at 1.

    Args:
        axes: where nothing else sets the limits.
        low, high: the ends of what is drawn, around 1.
        width: of the axes, CSS pixels.
    """
    room = 0.06 * math.log(high / low)
    axes.set_xscale("log")
    axes.set_xlim(low * math.exp(-room), high * math.exp(room))
    most = max(1, int(width / 110))
    ticks = _round_ratios(low, high, most) if high / low > 3 else _even_ratios(low, high, most)
    digits = max(len(f"{tick:.4g}".partition(".")[2]) for tick in ticks)
    axes.set_xticks(ticks, [times(tick, digits) for tick in ticks])
    axes.minorticks_off()
    slower, faster = "\N{LEFTWARDS ARROW} slower", "faster \N{RIGHTWARDS ARROW}"
    for at, text, side in ((0.0, slower, "left"), (1.0, faster, "right")):
        axes.annotate(
            text, (at, 0), (0, -30), xycoords="axes fraction", textcoords="offset points",
            ha=side, va="center", color=svg.MUTED,
        )  # fmt: skip


def _even_ratios(low: float, high: float, most: int) -> list[float]:
    """About `most` ratios at even distances, 1 among them."""
    steps = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    step = next((each for each in steps if (high - low) / each <= most), 2.0)
    places = range(math.ceil((low - 1) / step), math.floor((high - 1) / step) + 1)
    return [round(1 + step * place, 3) for place in places]


def _round_ratios(low: float, high: float, most: int) -> list[float]:
    """About `most` powers of ten and their double and fivefold, 1 among them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [
        float(f"{mantissa}e{exponent}")
        for exponent in exponents
        for mantissa in (1, 2, 5)
        if low <= float(f"{mantissa}e{exponent}") <= high
    ]
    step = math.ceil(len(ticks) / max(most, 1))
    return ticks[ticks.index(1.0) % step :: step]


def placed(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in CSS pixels from the upper left corner, without a frame."""
    total_width, total_height = (size * 72 for size in figure.get_size_inches())
    axes = figure.add_axes(
        (
            left / total_width,
            1 - (top + height) / total_height,
            width / total_width,
            height / total_height,
        )
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=7)
    axes.set_axisbelow(True)
    return axes


def _write_heading(axes: Axes, text: str, rise: float) -> None:
    axes.annotate(
        text, (0, 1), (0, rise + 4), xycoords="axes fraction", textcoords="offset points",
        ha="left", va="baseline", color=svg.MUTED,
    )  # fmt: skip


def number_axis(axes: Axes, unit: str) -> None:
    """A linear horizontal axis with few ticks, and its unit."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(unit, loc="right")


def log_axis(axes: Axes, write: Callable[[float], str] = distance) -> None:
    """Round numbers on a logarithmic vertical axis, with lines to read the values along."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    low, high = axes.get_ylim()
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [
            mantissa * 10.0**exponent
            for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for mantissa in mantissas
            if low <= mantissa * 10.0**exponent <= high
        ]
        if len(ticks) >= 3:
            break
    ticks = ticks[:: math.ceil(len(ticks) / 8)] or [low]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.minorticks_off()
    axes.tick_params(axis="y", labelcolor=svg.MUTED)
    axes.grid(axis="y", color=svg.RULE, linewidth=0.7)


def value_axis(axes: Axes, write: str) -> None:
    """A linear vertical axis with room around its values, and lines to read them along.

    Args:
        axes: with everything drawn in it.
        write: how a value is written, as a format of `x`.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_ylim()
    gap = (high - low) * 0.08 or abs(high) * 0.02
    axes.set_ylim(low - gap, high + gap)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(write)
    axes.tick_params(axis="y", labelcolor=svg.MUTED)
    axes.grid(axis="y", color=svg.RULE, linewidth=0.7)


def legend(axes: Axes) -> None:
    """Name the series above the axes, where `legend_height` is kept free."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    width = axes.get_window_extent().width * 72 / axes.figure.dpi
    columns = len(names) if legend_height(names, width) <= _LEGEND_LINE else 1
    axes.legend(
        handles, [_legend_name(name, width) for name in names], loc="lower left",
        bbox_to_anchor=(0, 1), frameon=False, ncols=columns, borderaxespad=0.3, borderpad=0,
        handlelength=1.4, columnspacing=1.6, labelspacing=0.35, labelcolor=svg.INK,
    )  # fmt: skip


def legend_height(names: Sequence[str], width: float) -> float:
    """What a legend takes: one line where all names fit beside each other, else one for each."""
    sizes = [len(_legend_name(name, width)) * CHARACTER + _LEGEND_HANDLE for name in names]
    return _LEGEND_LINE * (1 if sum(sizes) <= width else len(names))


def _legend_name(name: str, width: float) -> str:
    return shortened(name, min(38, int((width - _LEGEND_HANDLE) / CHARACTER)))


def name_places(axes: Axes, names: Sequence[str], width: float) -> None:
    """Some of the names below the axis, none over another."""
    longest = 18
    fitting = max(2, int((width - 90) / (longest * CHARACTER)))
    step = max(1, math.ceil(len(names) / fitting))
    places = list(range(0, len(names), step))
    axes.set_xticks(places, [shortened(names[place], longest - 2) for place in places])
    for label, place in zip(axes.get_xticklabels(), places, strict=True):
        label.set_horizontalalignment("left" if place == 0 else "center")
    axes.set_xlabel("layers in the order they run", loc="right")


def some_ticks(axes: Axes, places: Sequence[str], width: float) -> None:
    """Write the names of some places below the axis, of the last one always, none over another."""
    widest = max((len(line) for place in places for line in place.split("\n")), default=1)
    fitting = max(1, int(width / ((widest + 2) * CHARACTER)))
    # The last one is today's: the ticks are counted from there.
    shown = sorted(range(len(places) - 1, -1, -max(1, math.ceil(len(places) / fitting))))
    axes.set_xticks(shown, [places[place] for place in shown])
