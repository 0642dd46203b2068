"""The outcome of a gate: when it passes, and the page of it."""

from __future__ import annotations

from dataclasses import replace

from optfuse.report.verdicts import Criterion, Gate, Outcome, page
from tests.report.example import HOSTILE_NAMES

DRIFT = Criterion(
    option="--max-drift",
    name="drift",
    on="onnxruntime",
    limit=1e-5,
    allowed="<= 1e-05",
    value=3.1e-2,
    found="3.1e-02",
    outcome="passed",
    sentence="onnxruntime: the drift is 3.1e-02",
    next_step="Find the layer",
)


def criteria(**outcomes: Outcome) -> tuple[Criterion, ...]:
    """A criterion for each; the keyword's first word is its option."""
    return tuple(
        replace(
            DRIFT,
            option=f"--{key.split('_')[0]}",
            on=key,
            outcome=outcome,
            sentence=f"{key} is {outcome}",
        )
        for key, outcome in outcomes.items()
    )


def test_undecided_and_partly_compared_pass_unless_strict() -> None:
    found = criteria(drift="passed", speed_a="undecided", speed_b="not compared")
    easy, strict = Gate("net", found), Gate("net", found, strict=True)
    assert easy.passed
    assert (easy.failed, easy.unchecked) == ((), ())
    assert not strict.passed
    assert strict.failed == found[1:]


def test_a_limit_that_nothing_was_held_against_never_passes() -> None:
    found = criteria(drift="passed", speed_a="not compared", speed_b="not compared")
    for strict in (False, True):
        gate = Gate("net", found, strict=strict)
        assert not gate.passed
        assert (gate.failed, gate.unchecked) == ((), found[1:])


def test_a_failure_fails() -> None:
    found = criteria(drift="failed", speed="passed")
    assert Gate("net", found).failed == found[:1]
    assert not Gate("net", found).passed


def test_a_criterion_is_named_by_its_option_and_engine() -> None:
    assert DRIFT.title == "--max-drift on onnxruntime"
    assert replace(DRIFT, option="--max-operators", on="").title == "--max-operators"


def test_the_page_says_the_outcome_first() -> None:
    def headline(strict: bool = False, **outcomes: Outcome) -> str:
        return page(Gate("net", criteria(**outcomes), strict)).headline[0]

    assert headline(a="passed", b="undecided") == "net: passed (1 undecided, 1 passed)"
    assert headline(a="passed", b="not compared") == "net: not checked (1 not compared, 1 passed)"
    assert headline(a="passed", b="undecided", strict=True) == (
        "net: failed (1 undecided, 1 passed, strict)"
    )
    assert headline(a="failed", b="not compared", c="failed") == (
        "net: failed (2 failed, 1 not compared)"
    )


def test_the_page_has_a_line_for_each_criterion_and_the_sentences_of_those_that_did_not_pass() -> (
    None
):
    found = criteria(drift="passed", top="failed", speed_a="undecided", speed_b="passed")
    gate = Gate("net", found, warnings=("busy machine",), facts=("baseline report: old",))
    whole = page(gate)
    [limits] = whole.tables
    assert (whole.warnings, whole.facts) == (("busy machine",), ("baseline report: old",))
    assert limits.rows[1] == ("drift", "top", "<= 1e-05", "3.1e-02", "failed")
    assert [row[-1] for row in limits.rows] == ["passed", "failed", "undecided", "passed"]
    assert limits.notes == ("top is failed.", "speed_a is undecided.")
    # In a terminal the failures are said on standard error.
    assert page(gate, brief=True).tables[0].notes == ("speed_a is undecided.",)


def test_a_reason_that_engines_share_is_said_once() -> None:
    found = tuple(replace(each, sentence="no GPU") for each in criteria(a="undecided", b="failed"))
    assert page(Gate("net", found)).tables[0].notes == ("no GPU.",)


def test_hostile_names_stay_on_their_line() -> None:
    found = tuple(
        replace(DRIFT, on=name, sentence=name, outcome="failed") for name in HOSTILE_NAMES
    )
    shown = page(Gate(" ".join(HOSTILE_NAMES), found, False, HOSTILE_NAMES, HOSTILE_NAMES))
    texts = [*shown.headline, *shown.warnings, *shown.facts, *shown.tables[0].notes]
    texts += [cell for row in shown.tables[0].rows for cell in row]
    assert all(text.isprintable() for text in texts)
