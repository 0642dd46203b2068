"""Precisions in words: which of two sets of layers a row is about, and which samples were taken."""

from __future__ import annotations

from typing import Any

import pytest

from optfuse.report import precision, rows
from tests.report.example import full_report
from tests.report.pages import mixture

ORDER = ("a", "b", "c", "d", "e")
"""Layers, the least sensitive first."""

TWINS = ((0, 3e-7, 1.0), (2, 6e-3, 1.1), (3, 9.96e-3, 1.3), (3, 1.004e-2, None), (5, None, None))
"""How many layers are low, the drift, and the speed: three once within 0.01 and once beyond."""


def searched(low: str, *, block: str = "", **changes: Any) -> dict[str, Any]:
    """A document with a search among these layers, of which some were chosen to be low."""
    found = mixture(TWINS, chosen=len(low), layers=len(ORDER), max_drift=0.01)
    for point in found["curve"]:
        point["chosen"] = point["chosen"] and point["within"]
    found["sensitivities"] = [
        {
            "layer": name + block,
            "module": f"body.{name}",
            "relative_l2": place * 1e-3,
            "high": name not in low,
        }
        for place, name in enumerate(ORDER, start=1)
    ]
    return {"precision": {**found, **changes}}


def test_two_sets_of_as_many_layers_are_told_apart() -> None:
    [curve, _] = precision.precision(searched("abd"))
    assert [column.heading for column in curve.columns][:2] == ["layers in bf16", "which"]
    assert [(row[0], row[1], row[3], row[-2], row[-1]) for row in curve.rows] == [
        ("0", "", "3.0e-07", "yes", ""),
        ("2", "", "6.0e-03", "yes", ""),
        ("3", "some more sensitive", "1.0e-02", "yes", "chosen"),
        ("3", "the least sensitive", "1.0e-02", "no", ""),
        ("5", "", "infinite", "no", ""),
    ]
    assert curve.notes == (
        "The chosen 3 layers are not the 3 least sensitive: body.d in bf16 and body.c in fp32 "
        "drift less together.",
    )


@pytest.mark.parametrize(
    "document",
    [searched("ab"), searched("abd", block=", f"), searched("abd", sensitivities=[])],
    ids=["another set was chosen", "blocks of layers", "nothing known of the layers"],
)
def test_layers_are_named_only_where_it_is_known_which_differ(document: dict[str, Any]) -> None:
    [curve, *_] = precision.precision(document)
    assert "some more sensitive" in {row[1] for row in curve.rows}
    assert curve.notes == ()


def test_without_two_sets_of_as_many_layers_there_is_nothing_to_tell() -> None:
    [curve] = precision.precision({"precision": mixture()})
    assert "which" not in [column.heading for column in curve.columns]
    assert curve.notes == ()


def test_a_layer_that_cannot_be_low_at_all_is_the_most_sensitive() -> None:
    document = searched("abd")
    document["precision"]["sensitivities"][0]["relative_l2"] = None
    [_, sensitivities] = precision.precision(document)
    assert [row[:2] for row in sensitivities.rows][:2] == [
        ("body.a", "infinite"),
        ("body.e", "5.0e-03"),
    ]


@pytest.mark.parametrize(
    ("samples", "calibrated_on", "judged_on", "of_ranges", "of_drift"),
    [
        (None, None, None, "", None),
        (1, 1, 1, "", "Taken on 1 sample of mine.npz."),
        (10, 5, 5, *[" (of 10: every other one)"] * 2),
        (
            896,
            256,
            64,
            " (of 896: every other one, and at most 256, evenly spread)",
            " (of 896: every other one, and at most 64, evenly spread)",
        ),
        # A report of a version that did not write down how many there are.
        (None, None, 64, "", "Taken on 64 samples of mine.npz."),
    ],
)
def test_a_report_says_which_samples_were_taken_and_why_no_more(
    samples: int | None,
    calibrated_on: int | None,
    judged_on: int | None,
    of_ranges: str,
    of_drift: str | None,
) -> None:
    told = mixture(calibration="ranges from the data")
    document: dict[str, Any] = {**full_report(precision=told).document}
    document["settings"] = {
        **document["settings"],
        "data": "mine.npz",
        "samples": samples,
        "calibrated_on": calibrated_on,
        "judged_on": judged_on,
    }
    assert f"ranges from the data{of_ranges}" in precision.facts(document)
    taken = [note for note in rows.drift(document).notes if note.startswith("Taken on")]
    if of_drift is None:
        assert taken == []
    else:
        [note] = taken
        assert note.endswith(of_drift if of_drift.startswith("Taken") else f"mine.npz{of_drift}.")
