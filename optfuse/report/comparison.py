"""Several reports side by side: across models, engines and commits, and over time.

Like is compared with like: a trend holds reports of one model, inputs, engine, device, thread count
and machine, and where reports differ in one of those, the page says so. Two reports were not
measured interleaved, so their latencies tell as much about the machine's day as about the model;
their speed-ups were each measured against the export beside them, and can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from optfuse import stats
from optfuse.report import plots, rows
from optfuse.report.entries import (
    COMMIT_DIGITS,
    EXPORT,
    Documents,
    Entry,
    change,
    entries,
    trends_of,
)
from optfuse.report.frames import Line
from optfuse.report.illustrations import Illustration, Sketch, gain, verdicts
from optfuse.report.table import (
    NONE,
    Column,
    Document,
    Page,
    Table,
    decimals,
    interval,
    printable,
    significant,
    table,
    times,
)

_ASPECTS: tuple[tuple[str, Callable[[Entry], str]], ...] = (
    ("inputs", lambda each: each.inputs),
    ("device", lambda each: each.device),
    ("CPU threads", lambda each: str(each.threads)),
    ("machine", lambda each: each.machine),
)
"""What has to be the same for latencies of two reports to be compared."""


def page(documents: Documents, *, brief: bool = False) -> Page:
    """What several reports show together.

    Args:
        documents: of any kind; those of kind `diff` have no latency and are only listed.
        brief: for a terminal: without the command of each report.
    """
    found = entries(documents)
    trends = trends_of(found)
    return Page(
        headline=tuple(_headline(documents, found, trends)),
        warnings=tuple(printable(line) for line in _differences(found)),
        facts=tuple(
            f"{_reports([number])} is a diff and has no latency to compare: see it alone"
            for number, (_, document) in enumerate(documents, start=1)
            if document["kind"] == "diff"
        ),
        tables=(
            _speedups(found),
            _latencies(found, brief),
            *(
                _trend(title, trend, documents, brief)
                for title, trend in zip(_titles(trends), trends, strict=True)
            ),
            _listed(documents),
            _machines(documents),
            *([] if brief else [_commands(documents)]),
        ),
    )


def illustrations(documents: Documents) -> list[Illustration]:
    """The plots of that page."""
    sketch = Sketch()
    found = entries(documents)
    drawn = []
    compared = [
        (f"{_what(each)} ({each.number})", each.compared)
        for each in found
        if each.compared and each.compared["ratio"]
    ]
    if compared:
        lines = [plots.Row(printable(name), [gain(row)]) for name, row in compared]
        finding = verdicts([(name, row["verdict"]) for name, row in compared])
        reading = (
            "In brackets, the report. A line is the interval; the pale band is the noise floor."
        )
        draw = partial(plots.forest, lines=lines)
        drawn.append(sketch.draw("Speed-up", "Speed-up in every report", finding, reading, draw))
    trends = trends_of(found)
    return drawn + [
        _drawn_trend(title, trend, sketch)
        for title, trend in zip(_titles(trends), trends, strict=True)
    ]


def _differences(found: Sequence[Entry]) -> list[str]:
    """Why a latency is in no trend although other reports have one of the same model and engine."""
    in_trends = [each for trend in trends_of(found) for each in trend]
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for each in found:
        if each.after is not None:
            groups.setdefault((each.model, each.engine, each.against), []).append(each)
    sentences = []
    for (model, engine, _), group in groups.items():
        alone = any(each not in in_trends for each in group)
        if alone and len({each.number for each in group}) > 1:
            differing = [
                f"{name} ({_by_value([(each.number, value(each)) for each in group])})"
                for name, value in _ASPECTS
                if len({value(each) for each in group}) > 1
            ]
            sentences.append(
                f"{model} on {engine}: not all latencies of these reports can be compared, they "
                f"differ in {' and '.join(differing)}"
            )
    return sentences


def _by_value(values: Iterable[tuple[int, str]]) -> str:
    """Which reports have which value, e.g. `report 1: 2; reports 2 and 3: 4`."""
    numbers: dict[str, list[int]] = {}
    for number, text in values:
        numbers.setdefault(text or "unknown", []).append(number)
    return "; ".join(f"{_reports(own)}: {text}" for text, own in numbers.items())


def _headline(
    documents: Documents, found: Sequence[Entry], trends: Sequence[Sequence[Entry]]
) -> list[str]:
    models = dict.fromkeys(each.model for each in found)
    engines = dict.fromkeys(each.engine for each in found)
    what = f"{len(documents)} reports"
    if found:
        what += f": {_counted(len(models), 'model')} on {_counted(len(engines), 'engine')}"
    sentences = [what]
    compared = [(each, each.compared) for each in found if each.compared]
    if compared:
        sentences.append(_verdicts(found))
    decided = [
        (row["ratio"], f"{_what(each)} {_ratio(row)}")
        for each, row in compared
        if row["verdict"] != "undecided" and row["ratio"]
    ]
    if decided and max(decided)[0] > 1:
        sentences.append(f"most gained: {max(decided)[1]}")
    if decided and min(decided)[0] < 1:
        sentences.append(f"most lost: {min(decided)[1]}")
    sentences += [sentence for trend in trends if (sentence := _news(trend))]
    return [printable(sentence) for sentence in sentences]


def _news(trend: Sequence[Entry]) -> str:
    """What the last report of a trend brought over the one before."""
    before, now = trend[-2:]
    moved = _change_of(now, before)
    if moved is None:
        return ""
    ratio, floor = moved
    row = {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
    return (
        f"{_what(now)}: its speed-up is {_ratio(row)} of what it was in {_reports([before.number])}"
        f", {stats.verdict(ratio, floor)}"
    )


def _change_of(now: Entry, before: Entry) -> tuple[stats.Ratio, float] | None:
    if now.compared is None or before.compared is None:
        return None
    return change(now.compared, before.compared)


def _verdicts(found: Sequence[Entry]) -> str:
    compared = [each.compared["verdict"] for each in found if each.compared]
    counts = [
        f"{compared.count(verdict)} {verdict}"
        for verdict in ("faster", "slower", "undecided")
        if verdict in compared
    ]
    against = {each.against for each in found if each.compared}
    ending = f" against {against.pop()}" if len(against) == 1 else ""
    return ", ".join(counts) + ending


def _drift(ratio: float) -> str:
    """In times the export's own; of a low precision, whose hundredths say nothing, without them."""
    return times(ratio) if ratio < rows.LOW_PRECISION else f"{ratio:.0f}x"


def _speedups(found: Sequence[Entry]) -> Table:
    columns = (
        Column("report", number=True),
        Column("model"),
        Column("engine"),
        Column("times as fast", number=True),
        Column("verdict", verdict=True),
        Column("drift", number=True),
    )
    lines = [
        (
            str(each.number),
            each.model,
            each.engine,
            NONE if each.compared is None else _ratio(each.compared),
            NONE if each.compared is None else str(each.compared["verdict"]),
            NONE if each.drift is None else _drift(each.drift),
        )
        for each in found
        if each.compared is not None or each.drift is not None
    ]
    against = dict.fromkeys(each.against for each in found if each.compared)
    notes = []
    if against:
        notes.append(
            f"Against {', '.join(against)}, each measured interleaved with it; above 1 is faster."
        )
    if any(each.drift is not None for each in found):
        notes.append("Drift is in times the drift of the export as it comes.")
    return table("Speed-up", columns, lines, "No report compares latencies.", notes)


def _latencies(found: Sequence[Entry], brief: bool) -> Table:
    exported = all(each.against == EXPORT for each in found)
    columns = (
        Column("report", number=True),
        Column("model"),
        Column("engine"),
        Column("inputs"),
        *(() if brief else (Column("device"),)),
        Column("threads", number=True),
        Column("as exported ms" if exported else "against ms", number=True),
        Column("optimized ms" if exported else "itself ms", number=True),
    )
    lines = [
        (
            str(each.number),
            each.model,
            each.engine,
            each.inputs,
            *(() if brief else (each.device,)),
            str(each.threads),
            NONE if each.before is None else significant(each.before["median_ms"], 4),
            NONE if each.after is None else significant(each.after["median_ms"], 4),
        )
        for each in found
        if each.before or each.after
    ]
    notes = ["Medians, of a report and of what it was measured against."] if lines else ()
    return table("Latency", columns, lines, notes=notes)


def _trend(title: str, trend: Sequence[Entry], documents: Documents, brief: bool) -> Table:
    columns = (
        Column("report", number=True),
        Column("created"),
        *(() if brief else (Column("commit"),)),
        Column("median ms", number=True),
        *(() if brief else (Column("times the last", number=True),)),
        Column("times as fast", number=True),
        Column("change", number=True),
        Column("verdict", verdict=True),
    )
    lines = []
    for place, each in enumerate(trend):
        before = trend[place - 1] if place else None
        moved = None if before is None else _change_of(each, before)
        lines.append(
            (
                str(each.number),
                _date(each.created) if brief else _minute(each.created),
                *(() if brief else (each.commit or NONE,)),
                NONE if each.after is None else significant(each.after["median_ms"], 4),
                *(() if brief else (_times_the_last(each, before),)),
                NONE if each.compared is None else _ratio(each.compared),
                NONE if moved is None else _ratio(_row(moved[0])),
                NONE if moved is None else stats.verdict(*moved),
            )
        )
    notes = [
        "The change is that of the speed-up since the report above, with its interval. Medians of "
        "different reports were not measured side by side.",
        *_changed_settings(trend, documents),
    ]
    return table(title, columns, lines, notes=notes)


def _titles(trends: Sequence[Sequence[Entry]]) -> list[str]:
    """What each trend is called, with more words where the first ones do not tell them apart."""
    short = [f"Trend of {_what(trend[0])}" for trend in trends]
    return [
        printable(
            title
            if short.count(title) == 1
            else f"{title}, {trend[0].inputs}, {_reports([each.number for each in trend])}"
        )
        for title, trend in zip(short, trends, strict=True)
    ]


def _changed_settings(trend: Sequence[Entry], documents: Documents) -> list[str]:
    """Which versions and passes are not the same in all reports of a trend."""
    known: dict[str, dict[int, str]] = {}
    passes: dict[int, list[str]] = {}
    for number in dict.fromkeys(each.number for each in trend):
        document = documents[number - 1][1]
        versions = document["environment"].get("versions")
        for name, version in (versions if isinstance(versions, Mapping) else {}).items():
            known.setdefault(str(name), {})[number] = str(version or "none")
        passes[number] = [str(each) for each in document["settings"].get("passes") or ()]
    everywhere = set.intersection(*map(set, passes.values()))
    known["passes"] = {
        number: ", ".join(each for each in own if each not in everywhere) or "without"
        for number, own in passes.items()
    }
    return [
        f"Not the same in all of them: {name} ({_by_value(values.items())})."
        for name, values in known.items()
        if len(set(values.values())) > 1
    ]


def _times_the_last(each: Entry, before: Entry | None) -> str:
    if before is None or before.after is None or each.after is None:
        return NONE
    last = before.after["median_ms"]
    return times(each.after["median_ms"] / last) if last else NONE


def _listed(documents: Documents) -> Table:
    columns = (
        Column("report", number=True),
        Column("file"),
        Column("kind"),
        Column("operators", number=True),
        Column("created"),
        Column("commit"),
    )
    lines = [
        (
            str(number),
            label,
            document["kind"],
            _operators(document),
            _minute(document["created"]),
            str(document["environment"].get("commit") or NONE)[:COMMIT_DIGITS],
        )
        for number, (label, document) in enumerate(documents, start=1)
    ]
    return table("Reports", columns, lines)


def _operators(document: Document) -> str:
    program = document.get("program")
    if not isinstance(program, Mapping) or "operators_before" not in program:
        return NONE
    return f"{program['operators_before']} -> {program['operators_after']}"


def _machines(documents: Documents) -> Table:
    numbers: dict[str, list[int]] = {}
    for number, (_, document) in enumerate(documents, start=1):
        numbers.setdefault(rows.machine(document) or "unknown", []).append(number)
    lines = [(", ".join(map(str, own)), machine) for machine, own in numbers.items()]
    return table("Machines", (Column("reports"), Column("machine")), lines)


def _commands(documents: Documents) -> Table:
    lines = [
        (str(number), document["command"])
        for number, (_, document) in enumerate(documents, start=1)
    ]
    return table("Commands", (Column("report", number=True), Column("command")), lines)


def _drawn_trend(title: str, trend: Sequence[Entry], sketch: Sketch) -> Illustration:
    latencies = [
        _middle_runs(
            "optimized" if trend[0].against == EXPORT else trend[0].model,
            "ours",
            [each.after for each in trend],
        ),
        _middle_runs(
            "as exported" if trend[0].against == EXPORT else trend[0].against,
            "theirs",
            [each.before for each in trend],
        ),
    ]
    compared = [each.compared or {} for each in trend]
    ratios, lows, highs = ([row.get(key) for row in compared] for key in ("ratio", "low", "high"))
    speedup = Line("speed-up", ratios, lows, highs, kind="ours")
    news = _news(trend)
    finding = f"{news}." if news else f"{_what(trend[0])} in {_counted(len(trend), 'report')}."
    reading = (
        "The upright bars span the middle 80 of 100 runs of a latency, and the interval of a "
        "speed-up; a pale box is the noise floor of its report."
    )
    draw = partial(
        plots.trend,
        places=[_place(each) for each in trend],
        latencies=[line for line in latencies if any(line.values)],
        speedup=speedup,
        floors=[row.get("noise_floor") or 1.0 for row in compared],
    )
    return sketch.draw(title, title, finding, reading, draw)


def _middle_runs(
    label: str, kind: Literal["ours", "theirs"], measured: Sequence[Mapping[str, Any] | None]
) -> Line:
    """The median of each, with its 10th and 90th percentile."""
    medians, lows, highs = (
        [None if row is None else plots.quantile(row["samples_ms"], share) for row in measured]
        for share in (0.5, 0.1, 0.9)
    )
    return Line(printable(label), medians, lows, highs, kind)


def _what(each: Entry) -> str:
    # A contender's name in a bench says its engine.
    return (
        each.model if each.model.endswith(f"@{each.engine}") else f"{each.model} on {each.engine}"
    )


def _place(each: Entry) -> str:
    """When, and below it of which commit."""
    lines = [f"{each.created[5:10]} {each.created[11:16]}", each.commit]
    return "\n".join(printable(line) for line in lines if line)


def _ratio(row: Mapping[str, Any] | None) -> str:
    if row is None or row["ratio"] is None:
        return NONE
    return f"{times(row['ratio'], decimals(row))} {interval(row)}"


def _row(ratio: stats.Ratio) -> dict[str, float]:
    return {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}


def _date(created: str) -> str:
    return created[:10]


def _minute(created: str) -> str:
    return created[:16].replace("T", " ")


def _reports(numbers: Sequence[int]) -> str:
    names = [str(number) for number in dict.fromkeys(numbers)]
    if len(names) == 1:
        return f"report {names[0]}"
    return f"reports {', '.join(names[:-1])} and {names[-1]}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
