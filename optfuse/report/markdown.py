"""The report as Markdown, `report.md`: the tables of `rows` as GitHub draws them."""

from __future__ import annotations

import re

from optfuse.report import kinds, rows
from optfuse.report.table import Page, Table, printable
from optfuse.stages import Report

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;"})
_PUNCTUATION = re.compile(
    r"[\\`*|~$]"
    # An underscore inside a word, and brackets that are no link, mean nothing to Markdown.
    r"|(?<![^\W_])_|_(?![^\W_])"
    r"|\](?=[(\[:])"
    # What begins a heading, a quotation, a check box or a list, where a line begins.
    r"|^[#>\[]|^[-+](?=\s)|(?<=^\d)[.)](?=\s)"
)


def render(report: Report) -> str:
    """The whole report as GitHub-flavored Markdown, ending with a newline."""
    document = report.document
    blocks = [
        *_blocks(kinds.page(document)),
        "## Environment",
        _list(rows.environment(document)) or "Nothing is known of it.",
        "## Reproduce",
        _fenced(printable(document["command"])),
        f"Written {_escaped(printable(document['created']))}.",
    ]
    return "\n\n".join(blocks) + "\n"


def render_page(page: Page) -> str:
    """A page as GitHub-flavored Markdown, ending with a newline."""
    return "\n\n".join(_blocks(page)) + "\n"


def _blocks(page: Page) -> list[str]:
    """A page in pieces that stand apart from each other."""
    title, *details = page.headline
    warnings = [f"WARNING: {warning}" for warning in page.warnings]
    blocks = [f"# {_escaped(title)}", _list([*details, *warnings, *page.facts])]
    blocks += [block for table in page.tables for block in _section(table)]
    return [block for block in blocks if block]


def _section(table: Table) -> list[str]:
    if not table.rows and not table.empty:
        return []
    body = _table(table) if table.rows else _escaped(table.empty)
    return [f"## {_escaped(table.title)}", body, *(_escaped(note) for note in table.notes)]


def _table(table: Table) -> str:
    heading = [column.heading for column in table.columns]
    rule = ["---:" if column.number else "---" for column in table.columns]
    lines = [[_escaped(cell) for cell in line] for line in (heading, *table.rows)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _fenced(text: str) -> str:
    # The fence is longer than any run of backticks inside it.
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _PUNCTUATION.sub(lambda match: "\\" + match.group(), text).translate(_ENTITIES)
