"""Every convolution's history in words, on histories that are written out."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from optfuse.report import document, markdown, rows, schema, terminal
from optfuse.report.convolutions import CONVOLUTIONS, convolutions, happened, heading
from optfuse.stages import LayerEvent, LayerHistory
from tests.report.example import HOSTILE_NAMES, full_report

KEPT = LayerHistory(
    label="features.head",
    name="conv2d_9",
    module="features.head",
    call=1,
    calls=1,
    operator="conv2d",
    settings="1x1 32->64",
    source="net/blocks.py:31",
    within="",
    events=(),
    became=("conv2d",),
)
REWRITTEN = LayerEvent("fold_conv_bn", "rewritten", "batch_norm folded in", took_in=("norm",))


def history(**changes: Any) -> dict[str, Any]:
    """A history as it stands in the document, with some of its fields changed."""
    return schema.history_document(LayerHistory(**{**vars(KEPT), **changes}))


def lines(**changes: Any) -> list[str]:
    return happened(history(**changes))


def test_a_layer_is_named_with_what_it_is_and_where_it_is_called() -> None:
    assert heading(history()) == ("features.head", "conv2d 1x1 32->64  net/blocks.py:31")
    assert heading(history(source=""))[1] == "conv2d 1x1 32->64  source line unknown"


def test_what_a_pass_did_and_what_the_layer_is_now() -> None:
    assert lines(events=(REWRITTEN,), became=("conv_act",)) == [
        "fold_conv_bn: batch_norm folded in, from norm",
        "now conv_act",
    ]


def test_a_layer_that_stands_for_what_was_behind_it() -> None:
    event = LayerEvent("eliminate_identity", "rewritten", "gives conv2d", at=("clone (drop)",))
    assert lines(events=(event,)) == [
        "eliminate_identity at clone (drop): gives conv2d",
        "kept as it is",
    ]


def test_a_refusal_names_its_places() -> None:
    event = LayerEvent("fold_conv_bn", "refused", "it is in training mode", at=("batch_norm (n)",))
    assert lines(events=(event,)) == [
        "fold_conv_bn refused batch_norm (n): it is in training mode",
        "kept as it is",
    ]
    itself = LayerEvent("merge_branches", "refused", "its weight is not a constant")
    assert lines(events=(itself,))[0] == "merge_branches refused: its weight is not a constant"


def test_a_pass_that_was_undone() -> None:
    event = LayerEvent("fold_conv_bn", "undone", "it failed with KeyError")
    assert lines(events=(event,)) == [
        "fold_conv_bn was undone: it failed with KeyError",
        "kept as it is",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "kept as it is: no pass found anything to do here"),
        ({"within": "cond"}, "kept as it is: no pass looks inside a cond"),
        ({"became": (), "gone": "nothing uses it"}, "gone: nothing uses it"),
        ({"events": (REWRITTEN,), "one_with": ("a", "b")}, "now conv2d, one with a and b"),
        (
            {"events": (REWRITTEN,), "became": ("conv2d", "conv2d", "add")},
            "now 2 times conv2d and add",
        ),
    ],
)
def test_what_a_layer_is_in_the_end(changes: dict[str, Any], sentence: str) -> None:
    assert lines(**changes)[-1] == sentence


def test_long_lists_are_cut_where_that_saves_room() -> None:
    names = tuple("abcdef")
    cut = [
        lines(events=(REWRITTEN,), one_with=names[:number])[-1].removeprefix(
            "now conv2d, one with "
        )
        for number in (1, 3, 4, 5, 6)
    ]
    assert cut == ["a", "a, b and c", "a, b, c and d", "a, b, c and 2 more", "a, b, c and 3 more"]


def test_a_report_has_the_table_on_its_full_page_alone() -> None:
    report = full_report(histories=[KEPT])
    (table,) = convolutions(report.document)

    assert table.title == CONVOLUTIONS
    assert table.rows == (
        (
            "features.head",
            "conv2d 1x1 32->64",
            "net/blocks.py:31",
            "kept as it is: no pass found anything to do here",
        ),
    )
    assert table in rows.page(report.document).tables
    assert table not in rows.page(report.document, brief=True).tables
    assert "net/blocks.py:31" in document.render(report)
    assert "net/blocks.py:31" in markdown.render(report)
    assert schema.parse(schema.dump(report)).document == report.document


def test_a_report_from_before_there_were_histories_still_opens() -> None:
    report = full_report()
    older = {key: each for key, each in report.document.items() if key != "convolutions"}
    for step in older["steps"]:
        for place in (*step["sites"], *step["refused"]):
            del place["involved"]
    opened = schema.parse(schema.dump(type(report)(older)))

    assert opened.document == older
    assert CONVOLUTIONS not in [table.title for table in rows.page(opened.document).tables]
    document.render(opened)


def printed(
    histories: list[LayerHistory],
    width: int | None,
    norms: Sequence[str] = (),
    elsewhere: int = 0,
) -> str:
    """As a terminal of that width prints it, or where None a pipe."""
    output = io.StringIO()
    console = Console(
        file=output, width=width or 80, force_terminal=width is not None, color_system=None
    )
    terminal.render_histories(histories, norms, elsewhere, console)
    return output.getvalue()


LONG = LayerHistory(
    **{
        **vars(KEPT),
        "label": "features.inception3a.branches.1.0.conv",
        "events": (REWRITTEN, LayerEvent("merge_branches", "refused", "for a reason " * 9)),
        "one_with": ("features.inception3a.branches.0.conv", "features.other.conv"),
    }
)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_breaks_lines_and_sets_the_rest_further_in(width: int) -> None:
    text = printed([LONG, KEPT], width)

    assert max(map(cell_len, text.splitlines())) <= width
    assert re.search(r"\n {4}\S", text)
    assert "for a reason for a reason for a reason" in " ".join(text.split())
    assert "\n\nfeatures.head  conv2d" in text or "\n\nfeatures.head\n  conv2d" in text


def test_a_pipe_gets_each_line_whole() -> None:
    text = printed([LONG, KEPT], None).splitlines()

    assert text[0].endswith("1.0.conv  conv2d 1x1 32->64  net/blocks.py:31")
    assert text[2].startswith("  merge_branches refused: for a reason for a reason")
    assert len(text[2]) > 120
    assert text[5:] == [
        "features.head  conv2d 1x1 32->64  net/blocks.py:31",
        "  kept as it is: no pass found anything to do here",
    ]


def test_what_is_left_is_counted_and_nothing_is_said_to_be_nothing() -> None:
    assert printed([], None) == "The model has no convolution.\n"
    assert printed([KEPT], None, elsewhere=1).endswith(
        "\n\nRefused at no convolution and no linear layer: 1 place; see --by pass.\n"
    )
    norms = [f"norm{number} (behind relu)" for number in range(2)]
    assert printed([KEPT], None, norms).endswith(
        "\n\nBatch norms that stay, behind no convolution: norm0 (behind relu) and norm1 (behind"
        " relu).\n"
    )
    assert "linear layer: 7 places; see" in printed([KEPT], None, elsewhere=7)


def test_hostile_names_are_shown_as_they_are() -> None:
    name = " ".join(HOSTILE_NAMES)
    event = LayerEvent(name, "rewritten", name, (name,), (name,), (name,))
    hostile = LayerHistory(
        name, name, name, 1, 1, name, name, name, name, (event,), (name,), (name,)
    )
    for width in (80, None):
        text = printed([hostile, LayerHistory(**{**vars(hostile), "gone": name})], width)
        assert all(line.isprintable() for line in text.split("\n"))
        assert "[red]markup" in text
