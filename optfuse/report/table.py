"""A table and a page of them, ready to be drawn, and how numbers are written in them.

All text in a table is free of control characters, whatever a model calls its nodes, so that no name
can move the cursor, break out of a row or reorder a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]

NONE = "-"
"""What a cell shows that has no value."""

_MEGABYTE = 1e6


@dataclass(frozen=True)
class Column:
    """A column's heading, with its unit, and how its cells are set.

    Attributes:
        heading: e.g. `median ms`.
        number: set to the right and never broken over two lines.
        verdict: its cells are verdicts, never broken over two lines either.
    """

    heading: str
    number: bool = False
    verdict: bool = False


@dataclass(frozen=True)
class Table:
    """One table, ready to be drawn.

    Attributes:
        title: what it shows.
        columns: one for each cell of a row.
        rows: cells as text.
        empty: the sentence that stands in its place when it has no rows; may be empty.
        notes: sentences that belong below it.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    empty: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """What one report shows, in the order it is shown, whatever draws it.

    Attributes:
        headline: what was found, the most important sentence first.
        warnings: what nobody may overlook.
        facts: what else is said in a line.
        tables: in order.
    """

    headline: tuple[str, ...]
    warnings: tuple[str, ...]
    facts: tuple[str, ...]
    tables: tuple[Table, ...]


def printable(text: str) -> str:
    """The text on one line, with everything that is not a visible character or a space written as
    its escape sequence: newlines, ANSI escapes, direction overrides, lone surrogates."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text
    )


def significant(number: float | None, digits: int) -> str:
    """The number with that many significant digits and no exponent; digits before the decimal
    point are never dropped."""
    if number is None:
        return NONE
    if number == 0:
        return "0"
    # The exponent of the rounded number: 9.996 with three digits is 10.0 and not 10.00.
    exponent = int(f"{number:.{digits - 1}e}".split("e")[1])
    return f"{number:.{max(0, digits - 1 - exponent)}f}"


def distance(number: float | None) -> str:
    """A relative distance: two digits and an exponent, `0` where it is exactly zero."""
    return NONE if number is None else "0" if number == 0 else f"{number:.1e}"


def count(number: int | None) -> str:
    """A count as in `6.99 M` or `3.01 G`."""
    if number is None:
        return "not counted"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{significant(number / size, 3)} {unit}"
    return str(number)


def megabytes(size_bytes: int | None) -> str:
    """A size in units of 10^6 bytes, to three digits or to the kilobyte."""
    if size_bytes is None:
        return NONE
    if 0 < size_bytes < _MEGABYTE / 1e3:
        return "<0.001"
    return significant(size_bytes / _MEGABYTE, 3)


def times(ratio: float, decimals: int = 2) -> str:
    """A ratio as in `1.02x`."""
    return f"{ratio:.{decimals}f}x"


def interval(row: Mapping[str, Any]) -> str:
    """The confidence interval of a ratio as in `[0.99, 1.04]`."""
    if row["low"] is None or row["high"] is None:
        return "[unknown]"
    digits = decimals(row)
    return f"[{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def decimals(row: Mapping[str, Any]) -> int:
    """How many decimals a ratio needs beside its interval, the row's `low` and `high`."""
    # A narrow interval needs a third decimal, or "1.00 [1.00, 1.01] faster" contradicts itself.
    if row["low"] is None or row["high"] is None:
        return 2
    return 3 if row["high"] - row["low"] < 0.02 else 2


def table(
    title: str,
    columns: tuple[Column, ...],
    rows: Iterable[tuple[str, ...]],
    empty: str = "",
    notes: Sequence[str] = (),
) -> Table:
    """A table whose every cell is printable."""
    return Table(
        printable(title),
        columns,
        tuple(tuple(printable(cell) for cell in row) for row in rows),
        empty,
        tuple(printable(note) for note in notes),
    )


def caveats(document: Document) -> list[str]:
    """The document's own warnings: finding, cause and next step, one line each."""
    return [
        printable(f"{row['about']}: {row['finding']}. {row['cause']}. {row['next_step']}.")
        for row in document["warnings"]
    ]
