"""In which precision the model runs, in words: pure functions from the document to lines and rows.

All text that leaves here is free of control characters, whatever a model calls its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optfuse.report.table import (
    NONE,
    Column,
    Document,
    Table,
    distance,
    printable,
    table,
    times,
)

CURVE = "Drift against the share of layers in low precision"
"""The title of the table `precision` where a mixture was searched for."""

SENSITIVITY = "What each layer costs in low precision"
"""The title of the table of sensitivities."""

_MOST_SENSITIVE = 8


def facts(document: Document) -> list[str]:
    """How many layers run in which precision, and what the choice rests on, a line each."""
    found = document.get("precision")
    if not found:
        return []
    low = f"{found['low_layers']} of {found['layers']} layers in {found['low']}"
    lines = [f"precision {found['asked']}: {low}, inputs and outputs in {found['io']}"]
    if found["calibration"]:
        lines.append(found["calibration"])
    if found["reason"]:
        lines.append(found["reason"])
    return [printable(line) for line in lines]


def precision(document: Document, *, brief: bool = False) -> list[Table]:
    """The curve of drift against the share of layers in low precision, and what each layer costs.

    Args:
        document: the report.
        brief: the most sensitive layers only.
    """
    found = document.get("precision")
    if not found:
        return []
    tables = []
    if found["curve"]:
        tables.append(_curve(found))
    if found["sensitivities"]:
        tables.append(_sensitivities(found, _MOST_SENSITIVE if brief else None))
    return tables


def _curve(found: Mapping[str, Any]) -> Table:
    columns = (
        Column(f"layers in {found['low']}", number=True),
        Column("share", number=True),
        Column("drift rel. L2", number=True),
        Column("times as fast", number=True),
        Column(f"within {found['max_drift']:g}"),
        Column("chosen"),
    )
    rows = [
        (
            str(point["low"]),
            f"{point['share']:.0%}",
            distance(point["relative_l2"]),
            NONE if point["ratio"] is None else times(point["ratio"]),
            "yes" if point["within"] else "no",
            "chosen" if point["chosen"] else "",
        )
        for point in found["curve"]
    ]
    return table(CURVE, columns, rows)


def _sensitivities(found: Mapping[str, Any], limit: int | None) -> Table:
    columns = (
        Column("layer"),
        Column("drift rel. L2, alone low", number=True),
        Column("runs in"),
    )
    ordered = sorted(found["sensitivities"], key=lambda each: -float(each["relative_l2"]))
    rows = [
        (
            each["module"] or each["layer"],
            distance(each["relative_l2"]),
            "fp32" if each["high"] else found["low"],
        )
        for each in ordered[:limit]
    ]
    hidden = len(ordered) - len(rows)
    notes = [f"And {hidden} layers that cost less."] if hidden else ()
    return table(SENSITIVITY, columns, rows, notes=notes)
