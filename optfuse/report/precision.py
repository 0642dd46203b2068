"""In which precision the model runs, in words: pure functions from the document to lines and rows.

All text that leaves here is free of control characters, whatever a model calls its layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        settings = document["settings"]
        left_out = passed_over(settings.get("calibrated_on"), settings.get("samples"))
        lines.append(found["calibration"] + left_out)
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


def passed_over(used: int | None, samples: int | None) -> str:
    """Which of the user's samples served for something, where not all did; empty where they did,
    or where a report does not say how many there are.

    Args:
        used: how many, for calibrating or for judging: each has every other sample.
        samples: how many there are.
    """
    if not used or not samples or used == samples:
        return ""
    most = f", and at most {used}, evenly spread" if used < samples // 2 else ""
    return f" (of {samples}: every other one{most})"


def _curve(found: Mapping[str, Any]) -> Table:
    twins = _twins(found["curve"])
    columns = (
        Column(f"layers in {found['low']}", number=True),
        *((Column("which"),) if twins else ()),
        Column("share", number=True),
        Column("drift rel. L2", number=True),
        Column("times as fast", number=True),
        Column(f"within {found['max_drift']:g}"),
        Column("chosen"),
    )
    rows = [
        (
            str(point["low"]),
            *((_which(point, twins),) if twins else ()),
            f"{point['share']:.0%}",
            _drift(point),
            NONE if point["ratio"] is None else times(point["ratio"]),
            "yes" if point["within"] else "no",
            "chosen" if point["chosen"] else "",
        )
        for point in found["curve"]
    ]
    return table(CURVE, columns, rows, notes=_instead(found, twins))


def _twins(curve: Sequence[Mapping[str, Any]]) -> set[int]:
    """Of how many layers there are two sets on the curve: the least sensitive ones, which are
    beyond the limit, and the set that a search found within it by passing some of them over."""
    within = {point["low"] for point in curve if point["within"]}
    return within & {point["low"] for point in curve if not point["within"]}


def _which(point: Mapping[str, Any], twins: set[int]) -> str:
    """Which of two sets of as many layers this is."""
    if point["low"] not in twins:
        return ""
    return "some more sensitive" if point["within"] else "the least sensitive"


def _instead(found: Mapping[str, Any], twins: set[int]) -> list[str]:
    """What the chosen layers are, where the least sensitive ones are as many and others; nothing
    where they were looked at in blocks, of which a part may have been chosen."""
    chosen = next((point["low"] for point in found["curve"] if point["chosen"]), None)
    ordered = sorted(found["sensitivities"], key=_sensitivity)
    if chosen not in twins or any(", " in each["layer"] for each in ordered):
        return []
    kept = [each["module"] or each["layer"] for each in ordered[:chosen] if each["high"]]
    instead = [each["module"] or each["layer"] for each in ordered[chosen:] if not each["high"]]
    if not kept or not instead:
        return []
    return [
        f"The chosen {chosen} layers are not the {chosen} least sensitive: {', '.join(instead)} in "
        f"{found['low']} and {', '.join(kept)} in fp32 drift less together."
    ]


def _sensitivity(row: Mapping[str, Any]) -> float:
    """What layers are ordered by; an infinite drift is worst."""
    return math.inf if row["relative_l2"] is None else float(row["relative_l2"])


def _drift(row: Mapping[str, Any]) -> str:
    return "infinite" if row["relative_l2"] is None else distance(row["relative_l2"])


def _sensitivities(found: Mapping[str, Any], limit: int | None) -> Table:
    columns = (
        Column("layer"),
        Column("drift rel. L2, alone low", number=True),
        Column("runs in"),
    )
    ordered = sorted(found["sensitivities"], key=lambda each: -_sensitivity(each))
    rows = [
        (
            each["module"] or each["layer"],
            _drift(each),
            "fp32" if each["high"] else found["low"],
        )
        for each in ordered[:limit]
    ]
    hidden = len(ordered) - len(rows)
    notes = [f"And {hidden} layers that cost less."] if hidden else ()
    return table(SENSITIVITY, columns, rows, notes=notes)
