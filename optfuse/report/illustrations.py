"""Which plots belong to a document, and what each of them shows in a sentence.

A plot stands in the section of the table that holds its numbers, so a table's title says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from optfuse.report import plots, rows
from optfuse.report.frames import Line
from optfuse.report.precision import CURVE
from optfuse.report.table import Document, decimals, distance, printable, significant, times

_ALIKE = 1.6
"""Latencies further apart than this are not drawn on one axis: dots would lie on one line."""

_NAMED = 4
"""So many things are named in a sentence; more are counted."""

_NO_ABLATION = (
    "How fast the model is after each pass was not measured: 'optfuse optimize --ablate' does."
)
_FLOOR = "A line is the interval; the pale band is the noise floor: what lies in it may be chance."


@dataclass(frozen=True)
class Illustration:
    """One plot of a page.

    Attributes:
        section: the title of the table it belongs to.
        finding: what it shows, in a sentence.
        reading: how to read it.
        wide, narrow: the same as `<svg>` elements, for a wide page and for a phone.
    """

    section: str
    finding: str
    reading: str
    wide: str
    narrow: str


class Sketch:
    """Draws the plots of one page, so that no two of them have an id in common."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def draw(
        self, section: str, title: str, finding: str, reading: str, draw: Callable[[float], Any]
    ) -> Illustration:
        """One plot.

        Args:
            section: the title of the table it belongs to.
            title: what it is, in a few words.
            finding: what it shows, in a sentence.
            reading: how to read it.
            draw: a function of `plots`, given everything but its width.
        """
        title, finding = printable(title), printable(finding)
        wide, narrow = plots.both(draw, f"plot-{next(self._numbers)}", title, finding)
        return Illustration(printable(section), finding, printable(reading), wide, narrow)


def of(document: Document) -> list[Illustration]:
    """Every plot of a document, of any kind."""
    sketch = Sketch()
    if document["kind"] == "optimize":
        found = _of_optimize(document, sketch)
    elif document["kind"] == "bench":
        found = _of_bench(document, sketch)
    else:
        found = _of_diff(document, sketch)
    return list(found)


def _of_optimize(document: Document, sketch: Sketch) -> Iterator[Illustration]:
    yield from _waterfall(document, sketch)
    same = [row for row in document["speedups"] if row["engine"] == row["against_engine"]]
    other = [row for row in document["speedups"] if row["engine"] != row["against_engine"]]
    for shown, title in ((same, "Speed-up"), (other, "Speed-up over another engine")):
        lines = [plots.Row(printable(_compared(row)), [gain(row)]) for row in shown if row["ratio"]]
        if lines:
            draw = partial(plots.forest, lines=lines)
            finding = verdicts([(_compared(row), row["verdict"]) for row in shown])
            yield sketch.draw("Speed-up", title, finding, _FLOOR, draw)
    yield from _ablation(document, sketch)
    for label in dict.fromkeys(rows.placed(row["engine"], row) for row in document["latency"]):
        measured = [row for row in document["latency"] if rows.placed(row["engine"], row) == label]
        yield _distributions(measured, label, sketch)
    yield from _mixtures(document, sketch)
    if document["layers"] is not None:
        yield from _of_layers(document["layers"], rows.LAYERS, sketch)


def _waterfall(document: Document, sketch: Sketch) -> Iterator[Illustration]:
    steps = [step for step in document["steps"] if step["stage"] == "pass"]
    # Passes are run again until nothing changes; a round is shown again only where it did anything.
    stages: dict[tuple[str, int], plots.Stage] = {}
    for step in steps:
        round_ = sum(step["name"] == name for name, _ in stages) + 1
        if round_ == 1 or step["operators_after"] != step["operators_before"]:
            label = step["name"] + (f" ({round_})" if round_ > 1 else "")
            counts = step["operators_before"], step["operators_after"]
            stages[step["name"], round_] = plots.Stage(printable(label), *counts)
    if not stages:
        return
    first = next(iter(stages.values())).before
    drawn = [plots.Stage("as captured", first, first), *stages.values()]
    measured = [row for row in document["ablation"] if row["how"] == "up_to"]
    panels = {
        printable(engine): [
            _as_exported(document, engine),
            *(_after(measured, engine, name) if round_ == 1 else None for name, round_ in stages),
        ]
        for engine in dict.fromkeys(row["engine"] for row in measured)
    }
    reading = (
        f"Beside them, the latency after each pass against the export as it comes. {_FLOOR}"
        if panels
        else _NO_ABLATION
    )
    finding = _taken_away(list(stages.values()))
    draw = partial(plots.waterfall, stages=drawn, panels=panels)
    yield sketch.draw("Passes", "Operators after each pass", finding, reading, draw)


def _taken_away(stages: Sequence[plots.Stage]) -> str:
    first, last = stages[0].before, stages[-1].after
    if first == last:
        return f"The passes leave {first} operators as they are."
    best = max(stages, key=lambda stage: stage.before - stage.after)
    return (
        f"The passes take {first} operators to {last}; {best.label} alone removes "
        f"{best.before - best.after}."
    )


def _as_exported(document: Document, engine: str) -> plots.Gain | None:
    """The export as it comes against itself: 1, with nothing to compare."""
    places = {row.get("at") for row in document["ablation"]}
    for row in document["latency"]:
        if (row["engine"], row["variant"]) == (engine, "baseline") and row.get("at") in places:
            note = f"{significant(row['median_ms'], 4)} ms"
            return plots.Gain(1.0, None, None, note=note, hollow=True)
    return None


def _after(measured: Sequence[Mapping[str, Any]], engine: str, name: str) -> plots.Gain | None:
    for row in measured:
        if (row["engine"], row["pass"]) == (engine, name):
            return gain(row, note=f"{significant(row['median_ms'], 4)} ms")
    return None


def _ablation(document: Document, sketch: Sketch) -> Iterator[Illustration]:
    shown = [row for row in document["ablation"] if row["how"] != "up_to" and row["ratio"]]
    for engine in dict.fromkeys(row["engine"] for row in shown):
        own = [row for row in shown if row["engine"] == engine]
        lines = [
            plots.Row(
                printable(name),
                # The words that tell them apart stand in the caption.
                [gain(row, hollow=row["how"] == "without") for row in own if row["pass"] == name],
            )
            for name in dict.fromkeys(row["pass"] for row in own)
        ]
        lines += [
            plots.Row("all passes", [gain(row)])
            for row in rows.against_export(document)
            if row["engine"] == engine and row["ratio"] and row.get("at") == own[0].get("at")
        ]
        yield sketch.draw(
            rows.ablation_title(engine),
            f"What each pass earned on {engine}",
            _best_alone(own, engine),
            f"Filled: a pass alone. Outlined: all passes but this one. {_FLOOR}",
            partial(plots.forest, lines=lines),
        )


def _best_alone(own: Sequence[Mapping[str, Any]], engine: str) -> str:
    faster = [row for row in own if row["how"] == "alone" and row["verdict"] == "faster"]
    if not faster:
        return f"On {engine} no pass alone is faster than the export as it comes."
    best = max(faster, key=lambda row: float(row["ratio"]))
    return f"On {engine} {best['pass']} alone earns most, {times(best['ratio'], decimals(best))}."


def _mixtures(document: Document, sketch: Sketch) -> Iterator[Illustration]:
    """The mixtures of precisions that were tried, where one was searched for."""
    found = document.get("precision")
    if not found or not found["curve"]:
        return
    points = [
        plots.Mixture(
            point["share"],
            point["relative_l2"],
            point["ratio"],
            point["within"],
            f"chosen: {point['low']} of {found['layers']}" if point["chosen"] else "",
        )
        for point in found["curve"]
    ]
    reading = (
        "Each point is a set of layers that was measured, the least sensitive layers first; the "
        "ring is what was chosen."
    )
    if any(point.drift == 0 for point in points):
        reading += " A drift of zero has no place on this scale and stands below all others."
    if any(point.ratio is not None for point in points):
        where = f" on {found['timed_on']}" if found["timed_on"] else ""
        reading += f" Below, the speed of those that were timed{where}."
    draw = partial(plots.mixtures, points=points, limit=found["max_drift"], low=found["low"])
    yield sketch.draw(CURVE, "Drift of mixed precisions", _staying(found), reading, draw)


def _staying(found: Mapping[str, Any]) -> str:
    """How many layers can be low within the limit, and what the drift is with all of them low."""
    layers, low, limit = found["layers"], found["low"], f"{found['max_drift']:g}"
    every = max(found["curve"], key=lambda point: int(point["low"]))["relative_l2"]
    drift = "infinite" if every is None else distance(every)
    most = max((point["low"] for point in found["curve"] if point["within"]), default=0)
    if most == layers:
        return f"With {most} of {layers} layers in {low} the drift is {drift}, within {limit}."
    if not most:
        tried = f"No set of layers in {low} that was tried stays within {limit}"
        return f"{tried}; with all {layers} the drift is {drift}."
    within = f"With {most} of {layers} layers in {low} the drift stays within {limit}"
    return f"{within}; with all {layers} it is {drift}."


def _of_bench(document: Document, sketch: Sketch) -> Iterator[Illustration]:
    several = len(document["runs"]) > 1
    if several and all(run["batch"] for run in document["runs"]):
        yield from _sweep(document, sketch)
    for run in document["runs"]:
        ending = f", batch {run['batch']}" if several else ""
        for group in _alike(run["latency"]):
            yield _distributions(group, None, sketch, section=f"Latency{ending}")
        lines = [
            plots.Row(printable(row["name"]), [gain(row)]) for row in run["ratios"] if row["ratio"]
        ]
        if lines:
            against = run["ratios"][0]["against"]
            reading = f"All are compared with {against}. {_FLOOR}"
            draw = partial(plots.forest, lines=lines)
            finding = verdicts([(row["name"], row["verdict"]) for row in run["ratios"]])
            yield sketch.draw(f"Speed-up{ending}", "Speed-up", finding, reading, draw)


def _sweep(document: Document, sketch: Sketch) -> Iterator[Illustration]:
    runs = document["runs"]
    names = list(dict.fromkeys(row["name"] for run in runs for row in run["latency"]))
    if not names:
        return
    found = {(row["name"], run["batch"]): row for run in runs for row in run["latency"]}

    def lines(key: str) -> list[Line]:
        return [
            Line(
                printable(name),
                [(found.get((name, run["batch"])) or {}).get(key) for run in runs],
                kind="theirs" if number == 0 else "other",
            )
            for number, name in enumerate(names)
        ]

    panels = {"median latency, ms": lines("median_ms"), "items per s": lines("items_per_s")}
    best = max(
        (row for row in found.values() if row["items_per_s"]),
        key=lambda row: float(row["items_per_s"]),
        default=None,
    )
    finding = "No throughput was measured."
    if best is not None:
        finding = (
            f"{best['name']} gets through most, {significant(best['items_per_s'], 4)} items per s."
        )
    draw = partial(plots.sweep, batches=[run["batch"] for run in runs], panels=panels)
    section = "Latency and throughput by batch"
    reading = "All scales are logarithmic."
    yield sketch.draw(section, "Latency and throughput", finding, reading, draw)


def _alike(measured: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows in groups whose medians are near enough for one axis."""
    groups: list[list[Mapping[str, Any]]] = []
    for row in sorted(measured, key=lambda row: float(row["median_ms"])):
        if groups and row["median_ms"] <= _ALIKE * groups[-1][0]["median_ms"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _distributions(
    measured: Sequence[Mapping[str, Any]],
    engine: str | None,
    sketch: Sketch,
    section: str = "Latency",
) -> Illustration:
    """Every run of some things; where an engine is given, of the variants on it."""
    names = [row["name"] if engine is None else rows.VARIANTS[row["variant"]] for row in measured]
    ours = [engine is None or row["variant"] == "optimized" for row in measured]
    main = ours.index(True) if True in ours else -1
    where = "Half" if engine is None else f"{engine}: half"
    finding = (
        f"{where} of the {names[main]} runs took at most "
        f"{significant(measured[main]['median_ms'], 4)} ms, 99 of 100 at most "
        f"{significant(measured[main]['p99_ms'], 4)} ms."
    )
    reading = "Each dot is a run, the first at the top of its band; the line is the median."
    if any(len(row["samples_ms"]) > plots.MOST_DOTS for row in measured):
        reading += f" Of more than {plots.MOST_DOTS} runs some in the middle are not drawn."
    variants = [
        plots.Runs(printable(name), row["samples_ms"], own)
        for name, row, own in zip(names, measured, ours, strict=True)
    ]
    title = "Every run" if engine is None else f"Every run on {engine}"
    return sketch.draw(section, title, finding, reading, partial(plots.runs, variants=variants))


def _of_diff(document: Document, sketch: Sketch) -> Iterator[Illustration]:
    for row in document["compared"]:
        if row["layers"] is not None:
            labels = (printable(row["name"]), "the program itself")
            yield from _of_layers(row["layers"], f"Layers of {row['name']}", sketch, labels)


def _of_layers(
    found: Mapping[str, Any],
    section: str,
    sketch: Sketch,
    labels: tuple[str, str] = ("optimized", "as captured"),
) -> Iterator[Illustration]:
    """The error after every layer, where any could be compared."""
    if not found["rows"]:
        return
    errors = [row["relative_l2"] for row in found["rows"]]
    endless = any(error is None for error in errors)
    worst = "infinite" if endless else distance(max(errors))
    names = [row["name"] for row in found["rows"]]
    draw = partial(
        plots.layers,
        names=[printable(name) for name in names],
        ours=errors,
        own=[row["own_relative_l2"] for row in found["rows"]],
        suspect=names.index(found["suspect"]) if found["suspect"] in names else None,
        labels=labels,
    )
    reading = (
        f"The largest error of a layer is {worst}. Grey is the unchanged program in its own "
        "precision: what lies near it is rounding."
    )
    yield sketch.draw(section, "Drift per layer", rows.layer_finding(found), reading, draw)


def gain(row: Mapping[str, Any], note: str = "", hollow: bool = False) -> plots.Gain:
    """A row with `ratio`, `low`, `high` and `noise_floor` as it is drawn.

    Args:
        row: of any document.
        note: what to write beside it, the ratio by default.
        hollow: drawn as an outline.
    """
    if not note and row["ratio"]:
        note = times(row["ratio"], decimals(row))
    return plots.Gain(
        row["ratio"], row["low"], row["high"], row["noise_floor"], printable(note), hollow
    )


def _compared(row: Mapping[str, Any]) -> str:
    """A row of the document's `speedups` in words."""
    ours = (
        row["engine"] if row["variant"] == "optimized" else _variant(row["engine"], row["variant"])
    )
    if row["engine"] == row["against_engine"] and row["against"] == "baseline":
        return rows.placed(ours, row)
    return rows.placed(f"{ours} vs {_variant(row['against_engine'], row['against'])}", row)


def _variant(engine: str, variant: str) -> str:
    return f"{engine} {rows.VARIANTS[variant]}"


def verdicts(compared: Sequence[tuple[str, str]]) -> str:
    """Which of some things came out how, in a sentence.

    Args:
        compared: what, and its verdict.
    """
    found = []
    for verdict in ("faster", "slower", "undecided"):
        names = [name for name, own in compared if own == verdict]
        if len(names) > _NAMED:
            found.append(f"{verdict}: {len(names)} of {len(compared)}")
        elif names:
            found.append(f"{verdict}: {', '.join(names)}")
    text = "; ".join(found)
    return f"{text[:1].upper()}{text[1:]}."
