"""Which of our rewrites an engine's builder does by itself: pure functions from the document.

All text that leaves here is free of control characters, whatever a model calls its nodes.
"""

from __future__ import annotations

from optfuse.report.table import Column, Document, Table, printable, table


def findings(document: Document) -> list[Table]:
    """One table for each engine and target: each kind of rewrite, and whether the builder does it
    by itself."""
    found: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for each in document.get("builder_findings", ()):
        rows = found.setdefault((each["engine"], each["target"]), [])
        rows.append((each["rewrite"], each["verdict"], each["sentence"]))
    columns = (Column("rewrite"), Column("by itself"), Column("what its layers show"))
    return [
        table(printable(f"What the builder of {engine} {target} does by itself"), columns, rows)
        for (engine, target), rows in found.items()
    ]
