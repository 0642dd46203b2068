"""A gate as JUnit XML, which most CI systems show as tests: one test case a criterion."""

from __future__ import annotations

from xml.etree import ElementTree

from optfuse.report.table import printable
from optfuse.report.verdicts import Criterion, Gate


def render(gate: Gate) -> bytes:
    """The gate as an XML document in UTF-8.

    A criterion that fails the gate is a failure, a limit that nothing could be held against an
    error; what is undecided or not compared, and does not fail, is skipped.
    """
    kinds = [_kind(each, gate) for each in gate.criteria]
    totals = {
        "name": "optfuse check",
        "tests": str(len(kinds)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
    }
    root = ElementTree.Element("testsuites", totals)
    suite = ElementTree.SubElement(root, "testsuite", totals)
    for each, kind in zip(gate.criteria, kinds, strict=True):
        # What is not printable is escaped: XML has no way to write most of it.
        names = {"classname": printable(gate.name), "name": each.title}
        case = ElementTree.SubElement(suite, "testcase", names)
        if kind is None:
            ElementTree.SubElement(case, "system-out").text = f"{each.sentence}."
            continue
        found = ElementTree.SubElement(case, kind, message=f"{each.sentence}.")
        if kind != "skipped":
            found.set("type", each.outcome)
            found.text = f"{each.next_step}."
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _kind(each: Criterion, gate: Gate) -> str | None:
    """The element inside the test case, or None where the criterion passed."""
    if each.outcome == "passed":
        return None
    if each in gate.unchecked:
        return "error"
    return "failure" if each in gate.failed else "skipped"
