"""What to deploy, in words: pure functions from the document to lines and rows.

All text that leaves here is free of control characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optfuse.report.table import (
    NONE,
    Column,
    Document,
    Table,
    decimals,
    distance,
    interval,
    printable,
    significant,
    table,
    times,
)

RECOMMENDATION = "Recommendation"
"""The title of the table `recommendation`."""

_VARIANTS = {"baseline": "as exported", "optimized": "optimized"}
_ONE_OF = {"baseline": "the export as it comes", "optimized": "the optimized model"}


def sentence(document: Document) -> list[str]:
    """What to deploy, in a line; none where nothing was recommended."""
    found = document.get("recommendation")
    if not found:
        return []
    what = _ONE_OF[found["variant"]]
    return [printable(f"recommended: {what} on {found['engine']}. {found['reason']}")]


def recommendation(document: Document) -> list[Table]:
    """Everything that was measured, the fastest first, and how far each is behind it."""
    found = document.get("recommendation")
    if not found:
        return []
    columns = (
        Column("engine"),
        Column("variant"),
        Column("median ms", number=True),
        Column("the fastest is", number=True),
        Column("verdict", verdict=True),
        Column("drift rel. L2", number=True),
    )
    rows = [
        (
            each["engine"],
            _VARIANTS[each["variant"]],
            significant(each["median_ms"], 4),
            _behind(each["behind"]),
            each["verdict"],
            distance(each["relative_l2"]),
        )
        for each in found["candidates"]
    ]
    return [table(RECOMMENDATION, columns, rows, notes=[found["reason"]])]


def _behind(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return NONE
    return f"{times(ratio['ratio'], decimals(ratio))} {interval(ratio)}"
