"""The kinds of reports: which module knows the page of which one."""

from __future__ import annotations

from importlib import import_module

from optfuse.report.table import Document, Page

KINDS = {
    "optimize": "optfuse.report.rows",
    "bench": "optfuse.report.bench",
    "diff": "optfuse.report.diff",
}
"""A document's `kind` -> the module whose `page` says what it shows."""


def page(document: Document, *, brief: bool = False) -> Page:
    """What the report shows, in order.

    Args:
        document: of any kind.
        brief: for a terminal: leave out what a reader rarely needs.
    """
    found: Page = import_module(KINDS[document["kind"]]).page(document, brief=brief)
    return found
