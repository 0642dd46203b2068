"""The report in a terminal: compact enough to be pasted into a pull request.

Only verdicts are colored, and everything reads the same without color.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from optfuse.report import convolutions, kinds, rows
from optfuse.report.schema import history_document, step_document
from optfuse.report.table import Column, Page, Table, printable
from optfuse.stages import LayerHistory, Report, Step

_VERDICT_STYLES = {
    **{"faster": "green", "slower": "red", "undecided": "yellow"},
    **{"passed": "green", "failed": "red", "not compared": "yellow"},
}
_INDENT = 2
_GAP = 2
_FOLDED_WORD = 16
"""Words of more characters than this, such as paths, may be broken in a narrow terminal."""


def render(report: Report, console: Console) -> None:
    """Print a report of any kind."""
    document = report.document
    render_page(kinds.page(document, brief=True), console)
    console.print()
    _print(console, rows.machine(document))
    # Neither wrapped nor cut, so that it can be copied.
    console.print(Text(f"$ {printable(document['command'])}"), soft_wrap=True)


def render_page(page: Page, console: Console) -> None:
    """Print a page: its sentences, then its tables."""
    for sentence in page.headline:
        _print(console, sentence)
    for warning in page.warnings:
        _print(console, f"WARNING: {warning}")
    for line in page.facts:
        _print(console, line)
    for table in page.tables:
        _draw(console, table)


def render_explain(explained: Report | Sequence[Step], console: Console) -> None:
    """Print every place each pass rewrote, and every refusal with its reason."""
    if isinstance(explained, Report):
        steps = explained.document["steps"]
    else:
        steps = [step_document(step) for step in explained]
    lines = rows.explanation(steps)
    for level, line in lines or [(0, "No pass was run.")]:
        console.print(Padding(Text(line), (0, 0, 0, level * _INDENT), expand=False))


def render_histories(
    histories: Sequence[LayerHistory], norms: Sequence[str], elsewhere: int, console: Console
) -> None:
    """Print what became of every layer, and why; each line whole where no terminal has a width.

    Args:
        histories: of the layers.
        norms, elsewhere: what else there is to say, as `convolutions.left` takes it.
        console: where to.
    """
    for number, history in enumerate(map(history_document, histories)):
        if number:
            console.print()
        label, about = convolutions.heading(history)
        fits = cell_len(label) + _GAP + cell_len(about) <= console.width
        title = Text(label, style="bold")
        if fits or not console.is_terminal:
            title, about = Text.assemble(title, " " * _GAP, about), ""
        _hang(console, title, 0)
        for line in filter(None, (about, *convolutions.happened(history))):
            _hang(console, Text(line), _INDENT)
    if not histories:
        _hang(console, Text("The model has no convolution."), 0)
    for line in convolutions.left(norms, elsewhere):
        console.print()
        _hang(console, Text(line), 0)


def _hang(console: Console, line: Text, indent: int) -> None:
    """Print a line, and where it takes several of a terminal's, those behind it further in."""
    fits = indent + cell_len(line.plain) <= console.width
    if fits or not console.is_terminal:
        console.print(Text(" " * indent) + line, soft_wrap=True)
        return
    width = max(console.width - indent - _INDENT, 1)
    for number, part in enumerate(line.wrap(console, width)):
        console.print(Text(" " * (indent + (_INDENT if number else 0))) + part)


def _draw(console: Console, table: Table) -> None:
    if not table.rows and not table.empty:
        return
    console.print()
    if not table.rows:
        _print(console, table.empty)
        return
    console.print(Text(table.title, style="bold"))
    widths = _widths(table, console.width)
    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
        # Said outright, or rich narrows the columns where the table is wider than the console.
        width=_total(widths),
    )
    for column, width in zip(table.columns, widths, strict=True):
        justify: Literal["left", "right"] = "right" if column.number else "left"
        drawn.add_column(Text(column.heading), justify=justify, width=width, overflow="fold")
    for row in table.rows:
        cells = zip(table.columns, row, strict=True)
        drawn.add_row(*(_cell(column, cell) for column, cell in cells))
    # Where even the narrowest table is too wide, the terminal wraps it and nothing is cut off.
    console.print(drawn, crop=False)
    for note in table.notes:
        _print(console, note)


def _widths(table: Table, available: int) -> list[int]:
    """The width of every column, in characters.

    Where the table is too wide, headings break first, then sentences, then words such as paths;
    at each step the widest column gives way. Numbers, verdicts and a heading's words are never
    broken, which is why this is not left to rich.
    """
    limits = [_limits(column, cells) for column, cells in _columns(table)]
    widths = [widest for widest, *_ in limits]
    for narrowest in list(zip(*limits, strict=True))[1:]:
        while _total(widths) > available:
            flexible = [index for index, width in enumerate(widths) if width > narrowest[index]]
            if not flexible:
                break
            widths[max(flexible, key=lambda index: widths[index])] -= 1
    return widths


def _limits(column: Column, cells: Sequence[str]) -> tuple[int, int, int, int]:
    """A column's width with nothing broken, with a broken heading, sentences, and words."""
    heading = _longest(column.heading.split())
    whole = max(heading, _longest(cells))
    widest = max(whole, cell_len(column.heading))
    if column.number or column.verdict:
        return widest, whole, whole, whole
    word = _longest(" ".join(cells).split())
    return widest, whole, max(heading, word), max(heading, min(word, _FOLDED_WORD))


def _columns(table: Table) -> Iterator[tuple[Column, list[str]]]:
    for index, column in enumerate(table.columns):
        yield column, [row[index] for row in table.rows]


def _longest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=1)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _cell(column: Column, cell: str) -> Text:
    return Text(cell, style=_VERDICT_STYLES.get(cell, "") if column.verdict else "")


def _print(console: Console, text: str) -> None:
    console.print(Text(text))
