"""A gate as JUnit XML: well-formed whatever names there are, and counted right."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from optfuse.report import junit
from optfuse.report.table import printable
from optfuse.report.verdicts import Gate
from tests.report.example import HOSTILE_NAMES
from tests.report.test_verdicts import DRIFT, criteria


def parsed(gate: Gate) -> ElementTree.Element:
    text = junit.render(gate)
    assert text.startswith(b"<?xml version='1.0' encoding='utf-8'?>\n")
    assert text.endswith(b"</testsuites>\n")
    return ElementTree.fromstring(text)


def test_every_criterion_is_a_test_case_with_its_outcome() -> None:
    found = criteria(
        drift="passed", top="failed", speed_a="undecided", speed_b="passed", layers="not compared"
    )
    root = parsed(Gate("net", found))
    suites = [root, *root]
    assert [suite.tag for suite in suites] == ["testsuites", "testsuite"]
    for suite in suites:
        assert suite.attrib == {
            "name": "optfuse check",
            "tests": "5",
            "failures": "1",
            "errors": "1",
            "skipped": "1",
        }
    cases = root.findall("testsuite/testcase")
    assert [case.get("name") for case in cases] == [each.title for each in found]
    assert {case.get("classname") for case in cases} == {"net"}
    assert [case[0].tag for case in cases] == [
        "system-out",
        "failure",
        "skipped",
        "system-out",
        "error",
    ]
    assert cases[1][0].attrib == {"message": "top is failed.", "type": "failed"}
    assert cases[1][0].text == "Find the layer."
    assert cases[0][0].text == "drift is passed."


def test_strict_makes_a_failure_of_what_is_undecided() -> None:
    gate = Gate("net", criteria(speed_a="undecided", speed_b="not compared"), strict=True)
    root = parsed(gate)
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("2", "0", "0")


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "]]>", "&amp;", 'a"b', "\ufffe", "\x00"])
def test_hostile_names_are_read_back_as_they_are_shown(name: str) -> None:
    shown = printable(name)
    failed = replace(DRIFT, on=shown, sentence=shown, outcome="failed")
    [case] = parsed(Gate(name, (failed,))).findall("testsuite/testcase")
    assert (case.get("classname"), case.get("name")) == (shown, f"--max-drift on {shown}")
    assert case[0].get("message") == f"{shown}."
