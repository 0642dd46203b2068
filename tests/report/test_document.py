"""The HTML page: one file, nothing missing, names that stay names, readable for everybody."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from optfuse.report import (
    comparison,
    document,
    illustrations,
    kinds,
    precision,
    rows,
    schema,
    svg,
)
from optfuse.report.illustrations import Illustration
from optfuse.report.schema import Comparison
from optfuse.stages import Report, Step
from optfuse.stats import Ratio
from tests.report.example import empty_report, full_report, hostile_report
from tests.report.pages import (
    ablation,
    bench_report,
    diff_report,
    history,
    illustrated_report,
    layers,
    mixed_report,
)

VOID = {"meta", "br", "link", "wbr"}


class Reader(HTMLParser):
    """What a page consists of; complains about tags that are not closed as they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[tuple[int, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if self._open and re.fullmatch("h[1-6]", self._open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, *names: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def compared() -> str:
    documents = history([Ratio(1.02, 1.01, 1.03), Ratio(1.05, 1.04, 1.06), Ratio(1.0, 0.99, 1.01)])
    documents += [
        ("hostile", hostile_report().document),
        ("empty", empty_report().document),
        ("bench", bench_report().document),
        ("diff", diff_report().document),
    ]
    return document.render_comparison(documents)


PAGES: dict[str, Callable[[], str]] = {
    "full": lambda: document.render(full_report()),
    "illustrated": lambda: document.render(illustrated_report()),
    "empty": lambda: document.render(empty_report()),
    "hostile": lambda: document.render(hostile_report()),
    "bench": lambda: document.render(bench_report()),
    "bench without a batch": lambda: document.render(bench_report((None,))),
    "diff": lambda: document.render(diff_report()),
    "compared": compared,
}

every_page = pytest.mark.parametrize("name", PAGES)


@every_page
def test_it_is_whole_and_its_ids_and_references_agree(name: str) -> None:
    page = Reader(PAGES[name]())
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = [each["href"] for each in page.of("a", "use") if "href" in each]
    labels = [
        word
        for _, attributes in page.tags
        for word in attributes.get("aria-labelledby", "").split()
    ]

    assert len(ids) == len(set(ids))
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} | set(labels) <= set(ids)


@every_page
def test_it_needs_nothing_from_anywhere(name: str) -> None:
    text = PAGES[name]()
    page = Reader(text)

    assert not page.of("script", "link", "iframe", "img", "object", "base", "form")
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert not [key for _, attributes in page.tags for key in attributes if key == "src"]
    assert not re.search(r"@import|url\((?!#)", text)
    [policy] = [each["content"] for each in page.of("meta") if "http-equiv" in each]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@every_page
def test_headings_are_in_order_and_tables_and_plots_are_labeled(name: str) -> None:
    page = Reader(PAGES[name]())

    assert [level for level, _ in page.headings].count(1) == 1
    assert page.headings[0][0] == 1
    assert {level for level, _ in page.headings} <= {1, 2}
    assert all(text.strip() for _, text in page.headings)
    assert all(each.get("scope") in ("col", "row") for each in page.of("th"))
    assert all(each.get("role") == "img" for each in page.of("svg"))
    assert len(page.of("figcaption")) == len(page.of("figure")) == len(page.of("svg")) / 2
    # Whoever has no mouse can scroll a table all the same.
    regions = [each for each in page.of("div") if each.get("class") == "scroll"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
    assert page.of("html") == [{"lang": "en"}]


@pytest.mark.parametrize(
    "build",
    [full_report, illustrated_report, empty_report, hostile_report, bench_report, diff_report],
)
def test_everything_that_the_report_says_is_on_the_page(build: Callable[[], Report]) -> None:
    report = build()
    text = Reader(document.render(report)).text
    page = kinds.page(report.document)

    def shown(part: str) -> bool:
        return " ".join(part.split()) in text

    for table in page.tables:
        if not table.rows:
            assert shown(table.empty)
            continue
        parts = [table.title, *(column.heading for column in table.columns), *table.notes]
        assert all(map(shown, parts + [cell for row in table.rows for cell in row]))
    assert all(map(shown, (*page.warnings, *page.facts)))
    for line in rows.environment(report.document):
        key, _, value = line.partition(": ")
        assert shown(key)
        assert shown(value)
    assert shown(report.document["created"])


def test_the_numbers_of_the_headline_are_found_at_once() -> None:
    text = Reader(document.render(full_report())).text

    for words in (
        "onnxruntime undecided 1.02x [0.99, 1.04] against the export as it comes"
        " 1.25x of the export's own drift",
        "torch 2.9e-07 drift; the export's own is zero or unknown",
        "operators 196 → 120 before and after the passes",
        "tensorrt-rtx sm_89 not measured: no GPU",
    ):
        assert words in text
    assert "latency not measured" in Reader(document.render(empty_report())).text


def test_a_ratio_without_an_interval_says_so() -> None:
    ratio = Ratio(float("nan"), float("nan"), float("nan"))
    unknown = [Comparison("onnxruntime", "optimized", "onnxruntime", "baseline", ratio)]
    text = Reader(document.render(full_report(comparisons=unknown))).text

    assert "onnxruntime undecided unknown against the export as it comes" in text


def test_a_bench_shows_every_contender_of_every_batch() -> None:
    text = Reader(document.render(bench_report())).text

    assert "batch 8: net@onnxruntime faster 2.60x [2.50, 2.70] against net@torch" in text
    assert "batch 1: net@tensorrt not measured: no GPU" in text
    assert "net@onnxruntime gets through most" in text


def test_a_bench_of_one_thing_shows_its_median() -> None:
    alone = bench_report((None,))
    document_of_one = json.loads(schema.dump(alone))
    [run] = document_of_one["runs"]
    run["ratios"], run["latency"] = [], run["latency"][:1]
    text = Reader(document.render(Report(document_of_one))).text

    assert "net@torch 31.50 ms median" in text


def test_a_diff_shows_every_distance_and_who_is_to_blame() -> None:
    text = Reader(document.render(diff_report())).text

    assert "net@torch, net optimized@torch, net.onnx@onnxruntime inputs: x 1x3x224x224" in text
    assert "net@torch 1.5e-06 relative L2 from the captured program in float64 net opt" in text
    assert "1.8e-06 relative L2 from the captured program in float64 1.20x of the program" in text
    for sentence in kinds.page(diff_report().document).headline:
        assert sentence in text


def test_every_refusal_and_every_rewrite_has_its_line() -> None:
    report = full_report()
    text = Reader(document.render(report)).text

    for step in report.document["steps"]:
        for refused in step["refused"]:
            assert f"refused {refused['site']}: {refused['reason']}" in text
        for site in step["sites"]:
            assert f"rewritten {site['site']}" in text


def test_every_layer_of_an_engine_is_there_to_be_opened() -> None:
    page = Reader(document.render(full_report()))

    assert "All 57 layers, as exported" in page.text
    assert "All 40 layers, optimized" in page.text
    assert "node_Conv_38, node_Relu_38" in page.text


def test_a_long_table_is_folded_up_below_what_matters() -> None:
    text = document.render(illustrated_report())
    section = re.search(r"(?s)<h2[^>]*>Drift per layer</h2>(.*?)</section>", text)
    assert section
    before, _, folded = section[1].partition("<details>")

    assert "conv_act_7 (suspect)" in before
    # The suspect is one of the five worst, with the one that is not finite.
    assert before.count("<tr>") == 1 + 5
    assert "All 40 rows" in folded
    assert folded.count("<tr>") == 1 + 40


@pytest.mark.parametrize(
    ("build", "sections"),
    [
        (
            illustrated_report,
            [
                *("Passes", "Speed-up", "Speed-up", "What each pass earned on onnxruntime"),
                *("Latency", "Latency", "Drift per layer"),
            ],
        ),
        (empty_report, []),
        (mixed_report, ["Passes", "Speed-up", "Speed-up", "Latency", "Latency", precision.CURVE]),
        (diff_report, ["Layers of net optimized@torch"]),
        (
            bench_report,
            [
                "Latency and throughput by batch",
                *("Latency, batch 1", "Latency, batch 1", "Speed-up, batch 1"),
                *("Latency, batch 8", "Latency, batch 8", "Speed-up, batch 8"),
            ],
        ),
    ],
)
def test_a_plot_stands_with_the_table_of_its_numbers(
    build: Callable[[], Report], sections: list[str]
) -> None:
    report = build()
    titles = {table.title for table in kinds.page(report.document).tables}

    assert [each.section for each in illustrations.of(report.document)] == sections
    assert set(sections) <= titles


@pytest.mark.parametrize("documents", [history([Ratio(1.02, 1.01, 1.03)] * 3)])
def test_so_does_a_plot_of_several_reports(documents: comparison.Documents) -> None:
    titles = {table.title for table in comparison.page(documents).tables}

    assert {each.section for each in comparison.illustrations(documents)} <= titles


def test_a_plot_whose_table_is_missing_is_shown_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stray = Illustration("Elsewhere", "It says this.", "", "<svg></svg>", "<svg></svg>")
    monkeypatch.setattr(illustrations, "of", lambda _: [stray])
    page = Reader(document.render(full_report()))

    assert page.headings[-3][1] == "Elsewhere"
    assert "It says this." in page.text


def test_captions_say_what_was_found() -> None:
    findings = [each.finding for each in illustrations.of(illustrated_report().document)]

    assert findings == [
        "The passes take 196 operators to 120; fold_conv_bn alone removes 57.",
        "Undecided: onnxruntime.",
        "Faster: onnxruntime vs torch as exported; slower: onnxruntime as exported vs torch "
        "optimized.",
        "On onnxruntime fold_conv_bn alone earns most, 1.020x.",
        "torch: half of the as exported runs took at most 31.50 ms, 99 of 100 at most 57.52 ms.",
        "onnxruntime: half of the optimized runs took at most 12.00 ms, 99 of 100 at most 21.91 "
        "ms.",
        "conv_act_7 of inception3a.branch4.conv is the first layer to drift: it adds 80.0 times "
        "the usual error.",
    ]


def test_without_an_ablation_the_waterfall_says_how_to_get_one() -> None:
    [waterfall, *_] = illustrations.of(full_report().document)

    assert waterfall.reading.endswith("'optfuse optimize --ablate' does.")


def test_a_pass_that_does_something_in_every_round_has_a_bar_for_each() -> None:
    rounds = [Step("pass", "fold", 0.1, 90 - 10 * place, 80 - 10 * place) for place in range(3)]
    idle = Step("pass", "fold", 0.1, 60, 60)
    [waterfall, *_] = illustrations.of(full_report(steps=[*rounds, idle]).document)

    labels = re.findall(r">(fold[^<]*)</text>", waterfall.wide)
    assert labels == ["fold", "fold (2)", "fold (3)"]
    assert waterfall.finding.startswith("The passes take 90 operators to 60;")


def test_no_pass_that_earns_anything_is_said_so() -> None:
    costly = [replace(each, ratio=Ratio(0.9, 0.89, 0.91)) for each in ablation()]
    report = illustrated_report(ablation=costly)
    findings = [each.finding for each in illustrations.of(report.document)]

    assert "On onnxruntime no pass alone is faster than the export as it comes." in findings


def mixtures(report: Report) -> list[Illustration]:
    drawn = illustrations.of(report.document)
    return [each for each in drawn if each.section == precision.CURVE]


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        (
            {},
            "With 7 of 15 layers in bf16 the drift stays within 0.004; with all 15 it is 8.8e-03.",
        ),
        # What was chosen may be less than what the limit allows.
        (
            {"chosen": 0, "low": "int8"},
            "With 7 of 15 layers in int8 the drift stays within 0.004; with all 15 it is 8.8e-03.",
        ),
        ({"max_drift": 0.01}, "With 15 of 15 layers in bf16 the drift is 8.8e-03, within 0.01."),
        (
            {"max_drift": 1e-4, "chosen": 0},
            "No set of layers in bf16 that was tried stays within 0.0001; with all 15 the drift "
            "is 8.8e-03.",
        ),
        # Not even float32 is that exact.
        (
            {"max_drift": 1e-9, "chosen": 0},
            "No set of layers in bf16 that was tried stays within 1e-09; with all 15 the drift "
            "is 8.8e-03.",
        ),
        (
            {"points": [(0, 3e-7, 1.0), (7, 1e-3, 1.2), (15, None, None)]},
            "With 7 of 15 layers in bf16 the drift stays within 0.004; with all 15 it is infinite.",
        ),
    ],
)
def test_the_caption_of_mixtures_says_how_many_layers_stay_within_the_limit(
    changes: dict[str, Any], finding: str
) -> None:
    [drawn] = mixtures(mixed_report(**changes))

    assert drawn.finding == finding


@pytest.mark.parametrize("ratio", [None, 1.25])
@pytest.mark.parametrize("drift", [0.0, 3e-7])
def test_the_reading_of_mixtures_says_no_more_than_is_drawn(
    drift: float, ratio: float | None
) -> None:
    [drawn] = mixtures(mixed_report(points=[(0, drift, ratio), (15, 8.8e-3, None)], chosen=0))

    assert ("zero" in drawn.reading) is (drift == 0)
    assert ("timed on openvino" in drawn.reading) is (ratio is not None)
    for text in (drawn.wide, drawn.narrow):
        assert ("times as fast as with none in bf16" in text) is (ratio is not None)
        assert "chosen: 0 of 15" in text


def test_without_a_curve_no_mixtures_are_drawn() -> None:
    old = full_report().document
    without = {key: value for key, value in old.items() if key != "precision"}

    assert mixtures(mixed_report(curve=[])) == []
    assert mixtures(full_report()) == []
    # A report of a version that knew nothing of it.
    assert precision.CURVE not in [each.section for each in illustrations.of(without)]


def test_the_name_of_an_engine_that_timed_mixtures_is_text() -> None:
    [drawn] = mixtures(mixed_report(timed_on="a\n<b>"))

    assert "timed on a\\n<b>." in drawn.reading
    assert "timed on a\\n&lt;b&gt;." in document.render(mixed_report(timed_on="a\n<b>"))


def test_without_a_suspect_no_layer_is_blamed() -> None:
    report = illustrated_report(layers=layers(["a", "b"], suspect=None))
    findings = [each.finding for each in illustrations.of(report.document)]

    assert findings[-1] == "No layer adds more than 10 times the usual error."


@pytest.mark.parametrize("name", ["hostile", "compared"])
def test_hostile_names_are_text(name: str) -> None:
    text = PAGES[name]()

    assert "<script" not in text
    assert all(line.isprintable() for line in text.split("\n"))
    assert html.escape("<script>alert(1)</script>") in text
    assert "\\u202e" in text
    assert "\\ud800" in text
    text.encode("utf-8")


def test_a_quote_in_a_name_ends_no_attribute() -> None:
    page = Reader(document.render(full_report(name='"><b onclick="x">')))

    assert not [key for _, attributes in page.tags for key in attributes if key == "onclick"]
    assert page.headings[0] == (1, '"><b onclick="x">')


def test_the_same_report_gives_the_same_bytes() -> None:
    assert document.render(illustrated_report()) == document.render(illustrated_report())


def colors(block: str) -> dict[str, str]:
    return dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6});", block))


def schemes() -> dict[str, dict[str, str]]:
    """The colors of the page: light, dark and on paper."""
    style = re.search(r"(?s)<style>(.*?)</style>", document.render(empty_report()))
    assert style
    light, dark, paper = re.findall(r"(?s):root \{(.*?)\}", style[1])
    return {"light": colors(light), "dark": colors(dark), "paper": colors(paper)}


@pytest.mark.parametrize("scheme", ["light", "dark", "paper"])
def test_every_scheme_has_every_color_that_is_used(scheme: str) -> None:
    style = document.render(empty_report())
    used = {*re.findall(r"var\((--[a-z-]+)\)", style), *svg.VARIABLES.values()}

    assert used == set(schemes()[scheme])


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(color: str) -> float:
        channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in channels
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark", "paper"])
def test_text_and_marks_stand_out(scheme: str) -> None:
    found = schemes()[scheme]

    # The limits of WCAG 2.2 AA: 4.5 for text, 3 for what is drawn.
    for text, ground in (
        *(("--ink", ground) for ground in ("--paper", "--raised", "--band")),
        *(("--muted", ground) for ground in ("--paper", "--raised")),
        *(("--ours", "--paper"), ("--alarm", "--paper"), ("--alarm", "--raised")),
        *(("--good", "--good-pale"), ("--bad", "--bad-pale"), ("--open", "--open-pale")),
    ):
        assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for mark in ("--ours", "--theirs", "--second", "--third", "--alarm"):
        assert contrast(found[mark], found["--paper"]) >= 3, mark
    assert contrast(found["--ours"], found["--band"]) >= 3
