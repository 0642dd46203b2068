"""The report as one HTML page that needs nothing but itself: no network, no script, no other file.

It shows what `kinds.page` says, table for table, with the plots of `illustrations` in the sections
they belong to. Light and dark, phone and paper are the style sheet's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optfuse.report import comparison, illustrations, kinds, rows
from optfuse.report.entries import Documents
from optfuse.report.illustrations import Illustration
from optfuse.report.table import (
    Document,
    Page,
    Table,
    decimals,
    distance,
    printable,
    significant,
    times,
)
from optfuse.stages import Report

if TYPE_CHECKING:
    from jinja2 import Environment

_LONG = 16
"""A table of more rows than this is folded up."""

_WHOLE = 34
"""A column is never broken whose cells all have at most that many characters."""


@dataclass(frozen=True)
class Card:
    """One number that is found at once.

    Attributes:
        label: what it is of.
        number: e.g. `1.03x`.
        verdict: `faster`, `slower`, `undecided` or empty.
        detail: what belongs to it, e.g. the interval.
        second: another number that stands beside it, and what it is.
    """

    label: str
    number: str
    verdict: str = ""
    detail: str = ""
    second: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Fold:
    """What is there to be opened: a table, or lines with their level of indentation."""

    summary: str
    table: Table | None = None
    lines: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Section:
    """A table with its plots; what is too long is folded up.

    Attributes:
        ident: for links to it.
        table: its title, its notes, and its rows where they are few.
        plots: what shows the same at a glance.
        folds: what a reader opens.
    """

    ident: str
    table: Table
    plots: Sequence[Illustration]
    folds: Sequence[Fold]


def render(report: Report) -> str:
    """A report of any kind as one HTML page."""
    document = report.document
    full, brief = kinds.page(document), kinds.page(document, brief=True)
    return _html(
        kind=document["kind"],
        title=_title(document),
        cards=_cards(document),
        missing=_missing(document),
        page=full,
        # Where the cards say the same, the sentences need not; a diff's say more.
        sentences=full.headline if document["kind"] == "diff" else (),
        sections=_sections(full, brief, illustrations.of(document), _extras(document)),
        environment=[line.partition(": ") for line in rows.environment(document)],
        command=printable(document["command"]),
        written=printable(document["created"]),
    )


def render_comparison(documents: Documents) -> str:
    """Several reports as one HTML page."""
    full = comparison.page(documents)
    drawn = comparison.illustrations(documents)
    return _html(
        kind="comparison",
        title=full.headline[0],
        cards=(),
        missing=(),
        page=full,
        sentences=full.headline[1:],
        sections=_sections(full, comparison.page(documents, brief=True), drawn, []),
        environment=(),
        command="",
        written="",
    )


def _classes(table: Table) -> list[str]:
    """The style classes of a table's columns: on a phone a table may be wider than the page, and a
    name is broken only where even there it would be too wide."""
    classes = []
    for place, column in enumerate(table.columns):
        longest = max((len(row[place]) for row in table.rows), default=0)
        classes.append("number" if column.number else "whole" if longest <= _WHOLE else "long")
    return classes


def _html(**content: Any) -> str:
    return _templates().get_template("page.html.j2").render(**content).strip() + "\n"


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("optfuse", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["classes"] = _classes
    return made


def _title(document: Document) -> str:
    """What the page is about, in a few words."""
    if document["kind"] == "optimize":
        return printable(document["program"]["name"])
    things = document["contenders" if document["kind"] == "bench" else "compared"]
    return printable(", ".join(row["name"] for row in things))


def _cards(document: Document) -> list[Card]:
    """The headline as numbers."""
    if document["kind"] == "optimize":
        program = document["program"]
        counts = f"{program['operators_before']} \N{RIGHTWARDS ARROW} {program['operators_after']}"
        operators = Card("operators", counts, detail="before and after the passes")
        return [*_cards_of_engines(document), operators]
    if document["kind"] == "bench":
        return [card for run in document["runs"] for card in _cards_of_run(document, run)]
    return [_card_of_compared(document, row) for row in document["compared"]]


def _card_of_compared(document: Document, row: Mapping[str, Any]) -> Card:
    worst = row["samples"][row["worst_sample"]]
    error = "infinite" if worst["relative_l2"] is None else distance(worst["relative_l2"])
    card = Card(
        printable(row["name"]), error, detail=f"relative L2 from the {document['reference']}"
    )
    if worst["ratio_to_own"] is None or row is document["compared"][0]:
        return card
    return replace(card, second=(times(worst["ratio_to_own"]), "of the program's own"))


def _cards_of_run(document: Document, run: Mapping[str, Any]) -> list[Card]:
    batch = _batch(document, run)
    if run["ratios"]:
        return [
            _speedup_card(batch + row["name"], row, f"against {row['against']}")
            for row in run["ratios"]
        ]
    return [
        Card(printable(batch + row["name"]), f"{significant(row['median_ms'], 4)} ms", "", "median")
        for row in run["latency"]
    ]


def _batch(document: Document, run: Mapping[str, Any]) -> str:
    """What a run's numbers begin with where there are several runs."""
    return "" if len(document["runs"]) == 1 else f"batch {run['batch']}: "


def _cards_of_engines(document: Document) -> list[Card]:
    drift = {
        rows.placed(row["engine"], row): row
        for row in document["drift"]
        if row["variant"] == "optimized"
    }
    cards = []
    for row in rows.against_export(document):
        label = rows.placed(row["engine"], row)
        card = _speedup_card(label, row, "against the export as it comes")
        own = drift.pop(label, None)
        cards.append(card if own is None else replace(card, second=_drift_number(own)))
    for label, row in drift.items():
        number, words = _drift_number(row)
        cards.append(Card(printable(label), number, detail=words))
    return cards


def _speedup_card(label: str, row: Mapping[str, Any], words: str) -> Card:
    known = row["ratio"] is not None
    number = times(row["ratio"], decimals(row)) if known else "unknown"
    between = ""
    if known and row["low"] is not None and row["high"] is not None:
        low, high = (f"{row[end]:.{decimals(row)}f}" for end in ("low", "high"))
        between = f"[{low}, {high}] "
    return Card(printable(label), number, row["verdict"], printable(between + words))


def _drift_number(row: Mapping[str, Any]) -> tuple[str, str]:
    """A drift as a number, and what it is a number of."""
    if row["ratio_to_baseline"] is None:
        return distance(row["relative_l2"]), "drift; the export's own is zero or unknown"
    if row["ratio_to_baseline"] >= rows.LOW_PRECISION:
        return distance(row["relative_l2"]), "relative L2 to float64"
    return times(row["ratio_to_baseline"]), "of the export's own drift"


def _missing(document: Document) -> list[str]:
    """What the headline says was not measured."""
    if document["kind"] == "optimize":
        sentences = rows.not_measured(document)
        if not document["latency"] and not sentences:
            sentences = ["latency not measured"]
        return sentences
    if document["kind"] == "bench":
        return [
            printable(f"{_batch(document, run)}{row['name']} not measured: {row['reason']}")
            for run in document["runs"]
            for row in run["not_run"]
        ]
    return []


def _extras(document: Document) -> list[tuple[str, Fold]]:
    """What only a page has room for: the title of its section, and what is folded up there."""
    if document["kind"] != "optimize":
        return []
    places = rows.explanation(document["steps"])
    extras = [(title, Fold(table.title, table)) for title, table in rows.engine_layers(document)]
    if places:
        every = Fold("Every place that was rewritten or refused, and why", lines=places)
        extras.append((rows.REFUSED, every))
    return extras


def _sections(
    full: Page,
    brief: Page,
    drawn: Iterable[Illustration],
    extras: Iterable[tuple[str, Fold]],
) -> list[Section]:
    short = {table.title: table for table in brief.tables}
    waiting, folded = list(drawn), list(extras)
    sections: list[Section] = []
    for table in full.tables:
        if not table.rows and not table.empty:
            continue
        # A title that stands there twice gets its plots once.
        plots = [each for each in waiting if each.section == table.title]
        waiting = [each for each in waiting if each.section != table.title]
        folds = [fold for title, fold in folded if title == table.title]
        folded = [each for each in folded if each[0] != table.title]
        shown = table
        if len(table.rows) > _LONG:
            folds.insert(0, Fold(f"All {len(table.rows)} rows", table))
            shown = _shortened(table, short.get(table.title))
        sections.append(Section(f"section-{len(sections) + 1}", shown, plots, folds))
    # A plot without a table is shown all the same.
    for title in dict.fromkeys(each.section for each in waiting):
        plots = [each for each in waiting if each.section == title]
        sections.append(Section(f"section-{len(sections) + 1}", Table(title, (), ()), plots, ()))
    return sections


def _shortened(table: Table, brief: Table | None) -> Table:
    """The table with the rows a terminal shows, or with none where those are as many."""
    lines = brief.rows if brief is not None and brief.columns == table.columns else ()
    return Table(table.title, table.columns, lines if len(lines) <= _LONG else (), "", table.notes)
