"""What became of every convolution, in words: pure functions from the document to lines and rows.

All text that leaves here is free of control characters, whatever a model calls its modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from optfuse.report.table import NONE, Column, Document, Table, printable, table

History = Mapping[str, Any]
"""A `LayerHistory` as it stands in the document."""

CONVOLUTIONS = "Convolutions"
"""The title of the table `convolutions`."""

_SHOWN = 3


def heading(history: History) -> tuple[str, str]:
    """What a layer is called; and what it is, with the line that calls it."""
    source = history["source"] or "source line unknown"
    about = f"{history['operator']} {history['settings']}  {source}"
    return printable(history["label"]), printable(about)


def happened(history: History) -> list[str]:
    """What each pass did to a layer or why it did not, and what it is in the end: a line each."""
    lines = [_event(event) for event in history["events"]]
    return [printable(line) for line in (*lines, outcome(history))]


def outcome(history: History) -> str:
    """What a layer is in the end."""
    if history["gone"] is not None:
        return printable(f"gone: {history['gone']}")
    # At another place the layer only took over from what was behind it or beside it.
    if not any(each["what"] == "rewritten" and not each["at"] for each in history["events"]):
        return printable(f"kept as it is{_why_kept(history)}")
    counted: Counter[str] = Counter(history["became"])
    operators = [f"{n} times {name}" if n > 1 else name for name, n in counted.items()]
    others = f", one with {_listed(history['one_with'])}" if history["one_with"] else ""
    return printable(f"now {' and '.join(operators)}{others}")


def left(norms: Sequence[str], elsewhere: int) -> list[str]:
    """What there is to say of what no layer's history tells, in a line each.

    Args:
        norms: batch norms that stay, with what they stand behind.
        elsewhere: how many refused places have to do with no layer.
    """
    lines = []
    if norms:
        lines.append(f"Batch norms that stay, behind no convolution: {_listed(norms)}.")
    if elsewhere:
        places = "1 place" if elsewhere == 1 else f"{elsewhere} places"
        lines.append(f"Refused at no convolution and no linear layer: {places}; see --by pass.")
    return [printable(line) for line in lines]


def convolutions(document: Document) -> list[Table]:
    """Every layer's history as one table; none where the document has no histories."""
    histories = document.get("convolutions") or []
    columns = (Column("module"), Column("was"), Column("called at"), Column("what happened"))
    rows = [
        (
            history["label"],
            f"{history['operator']} {history['settings']}",
            history["source"] or NONE,
            "; ".join(happened(history)),
        )
        for history in histories
    ]
    return [table(CONVOLUTIONS, columns, rows)] if rows else []


def _why_kept(history: History) -> str:
    if history["within"]:
        return f": no pass looks inside a {history['within']}"
    return "" if history["events"] else ": no pass found anything to do here"


def _event(event: Mapping[str, Any]) -> str:
    if event["what"] == "undone":
        return f"{event['name']} was undone: {event['text']}"
    at = _listed(event["at"])
    if event["what"] == "refused":
        return f"{event['name']} refused{f' {at}' if at else ''}: {event['text']}"
    took_in = f", from {_listed(event['took_in'])}" if event["took_in"] else ""
    return f"{event['name']}{f' at {at}' if at else ''}: {event['text']}{took_in}"


def _listed(names: Sequence[str]) -> str:
    """The first few of the names, and how many there are besides."""
    left_out = len(names) - _SHOWN
    # One more takes no more room than saying so.
    shown = list(names) if left_out <= 1 else [*names[:_SHOWN], f"{left_out} more"]
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))
