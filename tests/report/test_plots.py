"""The plots: what they say is where the numbers are, and nothing in them can break a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from xml.etree import ElementTree

import pytest

from optfuse.report import plots, svg
from optfuse.report.frames import Line, shortened
from optfuse.report.plots import NARROW, WIDE, Gain, Mixture, Row, Runs, Stage
from tests.report.example import HOSTILE_NAMES

NAMES = [f"layer_{place}" for place in range(40)]
ERRORS: list[float | None] = [1e-7 * (place + 1) for place in range(40)]
BANDS = [Gain(1.02, 1.01, 1.03, 1.005, "1.02x"), Gain(0.97, 0.96, 0.98, 1.005, "0.97x", True)]
MIXTURES = [
    Mixture(0.0, 3.5e-7, 1.0, within=True),
    Mixture(0.2, 7.4e-4, 1.08, within=True),
    Mixture(0.4, 3.8e-3, 1.33, within=True, name="chosen: 6 of 15"),
    Mixture(0.4, 3.9e-3, None, within=True),
    Mixture(0.6, 4.7e-3, None, within=False),
    Mixture(1.0, 8.8e-3, None, within=False),
]

EVERY: dict[str, Callable[[float], Any]] = {
    "waterfall": partial(
        plots.waterfall,
        stages=[Stage("as captured", 197, 197), Stage("fold_conv_bn", 197, 139)],
        panels={"torch": [Gain(1.0, None, None), BANDS[0]], "onnxruntime": [None, BANDS[1]]},
    ),
    "many panels": partial(
        plots.waterfall,
        stages=[Stage("a pass", 9, 12)],
        panels={f"engine {place}": [BANDS[0]] for place in range(5)},
    ),
    "forest": partial(plots.forest, lines=[Row("torch", BANDS), Row("x" * 90, BANDS[:1])]),
    "wide forest": partial(plots.forest, lines=[Row("x", [Gain(90.0, 0.02, 300.0, 2.0)])]),
    "runs": partial(
        plots.runs, variants=[Runs("a", [1.0, 1.25, 1.5], True), Runs("b", [1.0] * 50 + [9.0])]
    ),
    "equal runs": partial(plots.runs, variants=[Runs("a", [2.5]), Runs("b", [2.5, 2.5])]),
    "no time at all": partial(plots.runs, variants=[Runs("a", [0.0, 0.0])]),
    "layers": partial(plots.layers, names=NAMES, ours=ERRORS, own=ERRORS, suspect=7),
    "late suspect": partial(plots.layers, names=NAMES, ours=ERRORS, own=ERRORS, suspect=39),
    "exact layers": partial(
        plots.layers, names=["a", "b"], ours=[0.0, 0.0], own=[0.0, None], suspect=None
    ),
    "endless layers": partial(
        plots.layers, names=["a", "b"], ours=[None, 1e308], own=[None, 5e-324], suspect=0
    ),
    "trend": partial(
        plots.trend,
        places=["03-04 07:08\nabc", "03-05 07:08"],
        latencies=[
            Line("ours", [1.0, 1.1], [0.9, 1.0], [1.2, 1.3], "ours"),
            Line("b", [2.0, None]),
        ],
        speedup=Line("speed-up", [1.02, 1.03], [1.01, None], [1.03, None], "ours"),
        floors=[1.004, 1.0],
    ),
    "mixtures": partial(plots.mixtures, points=MIXTURES, limit=0.004, low="bf16"),
    "untimed mixtures": partial(plots.mixtures, points=MIXTURES[3:], limit=0.004, low="int8"),
    "exact and endless mixtures": partial(
        plots.mixtures,
        points=[
            Mixture(0.0, 0.0, 1.0, within=True, name="chosen: 0 of 3"),
            Mixture(1 / 3, 5e-324, 0.0, within=True),
            Mixture(2 / 3, 1e308, None, within=False),
            Mixture(1.0, None, None, within=False),
        ],
        limit=0.01,
        low="fp16",
    ),
    "one exact mixture": partial(
        plots.mixtures, points=[Mixture(1.0, 0.0, 1.0, True, "chosen")], limit=1e-9, low="fp16"
    ),
    "sweep": partial(
        plots.sweep,
        batches=[1, 8, 32],
        panels={"ms": [Line(f"name {n}", [1.0, 7.0, None]) for n in range(7)]},
    ),
}

every_plot = pytest.mark.parametrize("name", EVERY)
every_width = pytest.mark.parametrize("width", [WIDE, NARROW])


def element(draw: Callable[[float], Any], width: float, ident: str = "p") -> ElementTree.Element:
    with svg.drawing():
        return ElementTree.fromstring(svg.inline(draw(width), ident, "A title", "It says this."))


def texts(root: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in root.iter("text")]


def figure(draw: Callable[[float], Any], width: float = WIDE) -> Any:
    with svg.drawing():
        return draw(width)


@every_plot
@every_width
def test_it_is_one_image_with_a_title_and_a_description(name: str, width: float) -> None:
    root = element(EVERY[name], width)

    assert root.tag == "svg"
    assert float(root.attrib["width"]) == pytest.approx(width, abs=0.01)  # two decimals are kept
    assert root.attrib["role"] == "img"
    assert [each.tag for each in root][:2] == ["title", "desc"]
    labels = {each.attrib["id"]: each.text for each in root if each.tag in ("title", "desc")}
    assert [labels[word] for word in root.attrib["aria-labelledby"].split()] == [
        "A title",
        "It says this.",
    ]


@every_plot
def test_no_color_style_date_or_font_of_its_own_reaches_the_page(name: str) -> None:
    with svg.drawing():
        text = svg.inline(EVERY[name](WIDE), "p", "t", "d")
    styles = "".join(re.findall(r'style="([^"]*)"', text))

    assert "<style" not in text
    assert "<metadata" not in text
    assert "xmlns" not in text
    assert "http" not in text
    # Only hidden backgrounds could have one, and they are none.
    assert not re.findall(r"#[0-9a-f]{6}", styles)
    assert set(re.findall(r"var\((--[a-z]+)\)", styles)) <= set(svg.VARIABLES.values())


@every_plot
@every_width
def test_every_reference_leads_to_an_id_that_begins_as_it_was_told(name: str, width: float) -> None:
    root = element(EVERY[name], width, "plot-7")
    ids = [each.attrib["id"] for each in root.iter() if "id" in each.attrib]
    text = ElementTree.tostring(root, encoding="unicode")
    referenced = set(re.findall(r"url\(#([^)]+)\)", text)) | set(
        re.findall(r'href="#([^"]+)', text)
    )

    assert len(ids) == len(set(ids))
    assert all(each.startswith("plot-7-") for each in ids)
    assert referenced <= set(ids)


@every_plot
@every_width
def test_no_text_begins_outside_the_image_or_on_another(name: str, width: float) -> None:
    root = element(EVERY[name], width)
    height = float(root.attrib["height"])
    seen: set[tuple[str, str]] = set()
    for each in root.iter("text"):
        place = each.attrib.get("x", ""), each.attrib.get("y", "")
        if not all(place):  # a line of several
            place = tuple(re.findall(r"translate\((\S+) (\S+)\)", each.attrib["transform"])[0])
        x, y = map(float, place)
        assert -1 <= x <= width + 1, each.text  # a pixel of rounding
        assert 0 <= y <= height, each.text
        # Two lines of the same text or of none may share a place; others would hide each other.
        assert place not in seen, each.text
        seen.add(place)


@every_plot
def test_the_same_numbers_give_the_same_bytes(name: str) -> None:
    assert plots.both(EVERY[name], "p", "t", "d") == plots.both(EVERY[name], "p", "t", "d")


@pytest.mark.parametrize(
    "label", ["a$x_1$b", r"\frac{1}{2}", "100%", "畳み込み", *HOSTILE_NAMES[4:6]]
)
def test_a_name_is_text_and_neither_a_formula_nor_markup(label: str) -> None:
    root = element(partial(plots.forest, lines=[Row(label, BANDS[:1])]), WIDE)

    assert label in texts(root)
    assert {each.tag for each in root.iter()} <= {
        *("svg", "title", "desc", "defs", "g", "path", "use", "text", "clipPath", "rect"),
    }


def test_a_name_that_looks_like_a_placeholder_stays_as_it_is() -> None:
    root = element(partial(plots.forest, lines=[Row(svg.OURS, BANDS[:1])]), WIDE)

    assert svg.OURS in texts(root)


def test_matplotlib_is_left_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    element(EVERY["trend"], WIDE)

    assert dict(matplotlib.rcParams) == before


def test_a_waterfall_says_how_many_are_left_and_how_many_went() -> None:
    stages = [Stage("a", 197, 197), Stage("b", 197, 139), Stage("c", 139, 142)]
    root = element(partial(plots.waterfall, stages=stages, panels={}), WIDE)

    assert {"197", "139 (−58)", "142 (+3)"} <= set(texts(root))  # noqa: RUF001 a minus sign


def test_the_bars_of_a_waterfall_are_as_long_as_the_counts() -> None:
    stages = [Stage("b", 200, 150)]
    [axes] = figure(partial(plots.waterfall, stages=stages, panels={})).axes
    left, gone = (bar for bar in axes.patches)

    assert (left.get_x(), left.get_width()) == (0, 150)
    assert (gone.get_x(), gone.get_width()) == (150, 50)


def test_a_ratio_stands_right_of_one_where_it_is_faster_and_its_interval_around_it() -> None:
    gains = [Gain(1.02, 1.01, 1.04, 1.005), Gain(0.95, 0.94, 0.97, 1.005)]
    [axes] = figure(
        partial(plots.forest, lines=[Row(str(n), [g]) for n, g in enumerate(gains)])
    ).axes
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    intervals = [tuple(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2.4]
    floors = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]

    assert marks == [1.02, 0.95]
    assert intervals == [(1.01, 1.04), (0.94, 0.97)]
    # The band reaches from 1 / floor to the floor, within rounding of a float64.
    assert floors == [pytest.approx((1 / 1.005, 1.005), rel=1e-12)] * 2
    assert axes.get_xlim()[0] < 0.94 < 1.04 < axes.get_xlim()[1]
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    "gains",
    [
        [(0.998, 1.003)],
        [(0.95, 1.30)],
        [(0.2, 1.01)],
        [(0.99, 5.5)],
        [(0.01, 900.0)],
    ],
)
@every_width
def test_the_axis_of_ratios_always_shows_one_and_round_numbers(
    gains: Sequence[tuple[float, float]], width: float
) -> None:
    lines = [Row("x", [Gain((low * high) ** 0.5, low, high)]) for low, high in gains]
    [axes] = figure(partial(plots.forest, lines=lines), width).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    ticks = list(axes.get_xticks())

    assert 1.0 in ticks
    # What is written is where it stands.
    assert [float(label.removesuffix("x")) for label in labels] == pytest.approx(ticks, rel=1e-9)
    assert len(labels) <= 12
    assert len(set(labels)) == len(labels)


def test_every_run_is_a_dot_and_the_line_is_the_median() -> None:
    samples = [1.0, 4.0, 2.0, 3.0, 2.5]
    [axes] = figure(partial(plots.runs, variants=[Runs("a", samples)])).axes
    dots, median = axes.lines

    assert list(dots.get_xdata())[::3] == samples
    turns = list(dots.get_ydata())[::3]
    assert turns == sorted(turns)
    assert list(median.get_xdata()) == [2.5, 2.5]


def test_a_run_far_beyond_the_others_is_counted_at_the_edge() -> None:
    samples = [1.0 + 0.001 * place for place in range(99)] + [50.0]
    [axes] = figure(partial(plots.runs, variants=[Runs("a", samples)])).axes

    assert axes.get_xlim()[1] < 1.3
    assert [text.get_text() for text in axes.texts if "up to" in text.get_text()] == [
        "+1 up to 50.0 ms →"
    ]


def test_of_very_many_runs_the_extremes_are_all_drawn() -> None:
    samples = [10.0 + 0.1 * ((place * 7919) % 1000) / 1000 for place in range(10_000)]
    samples[1234], samples[4321] = 9.97, 10.14
    [axes] = figure(partial(plots.runs, variants=[Runs("a", samples)])).axes
    drawn = list(axes.lines[0].get_xdata())[::3]

    assert {9.97, 10.14} <= set(drawn)
    # A few hundred in the middle, and 3 of 100 at the ends.
    assert plots.MOST_DOTS <= len(drawn) <= plots.MOST_DOTS + 320


def test_layers_show_the_suspect_and_what_is_infinite() -> None:
    ours: list[float | None] = [1e-7, 2e-7, 5e-5, None]
    draw = partial(plots.layers, names=list("abcd"), ours=ours, own=[1e-7] * 4, suspect=2)
    [axes] = figure(draw).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}

    assert lines["optimized"] == [1e-7, 2e-7, 5e-5]
    assert lines["as captured"] == [1e-7] * 4
    assert len(lines["infinite"]) == 1
    ring = next(line for line in axes.lines if line.get_markersize() == 15)
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([2], [5e-5])
    assert "c" in [text.get_text() for text in axes.texts]


def test_an_exact_layer_stands_at_the_bottom_of_the_scale() -> None:
    draw = partial(plots.layers, names=["a", "b"], ours=[0.0, 4e-7], own=[None, None], suspect=None)
    [axes] = figure(draw).axes

    assert list(axes.lines[0].get_ydata()) == [axes.get_ylim()[0], 4e-7]


def marked(axes: Any, label: str) -> list[tuple[float, float]]:
    """Where the points of a label are."""
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_label() == label
        for x, y in zip(*line.get_data(), strict=True)
    ]


def circled(axes: Any) -> list[tuple[float, float]]:
    rings = [line for line in axes.lines if line.get_markersize() == 15]
    return [(ring.get_xdata()[0], ring.get_ydata()[0]) for ring in rings]


@every_width
def test_mixtures_within_the_limit_are_told_from_those_beyond_it(width: float) -> None:
    upper, lower = figure(EVERY["mixtures"], width).axes
    limits = [line.get_ydata() for line in upper.lines if line.get_label() == "limit 0.004"]
    fillings = {line.get_label(): line.get_markerfacecolor() for line in upper.lines}

    assert upper.get_yscale() == "log"
    assert [list(limit) for limit in limits] == [[0.004, 0.004]]
    assert marked(upper, "within it") == [(0, 3.5e-7), (20, 7.4e-4), (40, 3.8e-3), (40, 3.9e-3)]
    assert marked(upper, "beyond it") == [(60, 4.7e-3), (100, 8.8e-3)]
    # By more than a color, which not everyone sees.
    assert (fillings["within it"], fillings["beyond it"]) == (svg.OURS, svg.PAPER)
    assert marked(lower, "within it") == [(0, 1.0), (20, 1.08), (40, 1.33)]
    assert upper.get_xlim() == lower.get_xlim()
    assert upper.get_position().x0 == lower.get_position().x0
    assert upper.get_position().x1 == lower.get_position().x1


@every_width
def test_the_chosen_mixture_has_a_ring_wherever_it_is_drawn_and_a_name(width: float) -> None:
    upper, lower = figure(EVERY["mixtures"], width).axes

    assert circled(upper) == [(40, 3.8e-3)]
    assert circled(lower) == [(40, 1.33)]
    assert [text.get_text() for text in upper.texts] == ["chosen: 6 of 15"]


@pytest.mark.parametrize("place", range(len(MIXTURES)))
@every_width
def test_the_name_of_a_mixture_stays_inside_and_off_the_points(place: int, width: float) -> None:
    points = [replace(each, name="") for each in MIXTURES]
    points[place] = replace(points[place], name="chosen: 15 of 15")
    drawn = figure(partial(plots.mixtures, points=points, limit=0.004, low="bf16"), width)
    with svg.drawing():
        drawn.draw_without_rendering()
    axes = drawn.axes[0]
    [box] = [text.get_window_extent() for text in axes.texts]
    places = axes.transData.transform(
        [(100 * each.share, each.drift) for each in points if each.drift]
    )

    assert drawn.bbox.x0 <= box.x0 < box.x1 <= drawn.bbox.x1
    assert axes.bbox.y0 <= box.y0
    assert not box.overlaps(axes.get_legend().get_window_extent())
    assert not any(box.contains(x, y) for x, y in places)


def test_mixtures_that_were_not_timed_have_one_panel() -> None:
    [axes] = figure(EVERY["untimed mixtures"]).axes

    assert axes.get_xlabel() == "% of the layers in int8"
    assert len(axes.get_xticks()) > 2


def test_a_drift_of_zero_is_the_lowest_and_an_infinite_one_the_highest() -> None:
    points = [
        Mixture(0.0, 0.0, None, within=True),
        Mixture(0.5, 2e-4, None, within=True),
        Mixture(0.8, 7.0, None, within=False),
        Mixture(1.0, None, None, within=False),
    ]
    [axes] = figure(partial(plots.mixtures, points=points, limit=0.01, low="fp16")).axes
    [(_, zero), (_, small)] = marked(axes, "within it")
    [(_, large)] = marked(axes, "beyond it")
    [(_, endless)] = marked(axes, "infinite")
    bottom, top = axes.get_ylim()

    assert 0 < bottom < zero < small == 2e-4
    assert large == 7.0 < endless <= top


def test_a_trend_without_ratios_has_one_panel() -> None:
    latencies = [Line("ours", [1.0, 2.0], kind="ours")]
    draw = partial(
        plots.trend,
        places=["a", "b"],
        latencies=latencies,
        speedup=Line("speed-up", [None, None], kind="ours"),
        floors=[1.0, 1.0],
    )
    assert len(figure(draw).axes) == 1


def test_the_last_place_of_a_long_trend_is_always_named() -> None:
    places = [f"03-{day:02} 07:08" for day in range(1, 32)]
    values = [1.0 + 0.01 * day for day in range(31)]
    draw = partial(
        plots.trend,
        places=places,
        latencies=[Line("ours", values, kind="ours")],
        speedup=Line("speed-up", values, kind="ours"),
        floors=[1.0] * 31,
    )
    for axes in figure(draw, NARROW).axes:
        assert [label.get_text() for label in axes.get_xticklabels()][-1] == "03-31 07:08"


@pytest.mark.parametrize(
    ("text", "most", "short"),
    [("conv2d", 6, "conv2d"), ("conv2d_17", 6, "con…17"), ("conv2d_17", 0, "c…7")],
)
def test_a_long_name_loses_its_middle(text: str, most: int, short: str) -> None:
    assert shortened(text, most) == short
