"""The page in a real browser: nothing sticks out, nothing is asked for, nothing is blank."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from optfuse.report import document
from optfuse.stats import Ratio
from tests.report.example import hostile_report
from tests.report.pages import (
    bench_report,
    diff_report,
    history,
    illustrated_report,
    mixed_report,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt install chromium"),
]

PHONE, TABLET, DESKTOP = WIDTHS = (390, 820, 1280)
DARK, LIGHT = 0, 1

PAGES: dict[str, Callable[[], str]] = {
    "illustrated": lambda: document.render(illustrated_report()),
    "hostile": lambda: document.render(hostile_report()),
    "diff": lambda: document.render(diff_report()),
    "bench": lambda: document.render(bench_report()),
    "mixed": lambda: document.render(mixed_report()),
    "compared": lambda: document.render_comparison(
        history([Ratio(1.02, 1.01, 1.03), Ratio(1.05, 1.04, 1.06)])
    ),
}

MEASURE = """
<script>
addEventListener("load", () => {
  const every = (name) => [...document.querySelectorAll(name)];
  const boxes = new Set(every(".scroll *, svg *"));
  const outside = every("body *").filter((each) => {
    const box = each.getBoundingClientRect();
    return !boxes.has(each) && box.width && (box.right > innerWidth + 1 || box.left < -1);
  });
  const shown = (name) => every(name).filter((each) => each.checkVisibility());
  const texts = shown("svg text").map((each) => each.getBoundingClientRect().height);
  const drawings = shown("svg").map((each) => each.getBoundingClientRect());
  const cut = shown("svg text").filter((each) => {
    const own = each.getBoundingClientRect();
    const all = each.ownerSVGElement.getBoundingClientRect();
    return own.left < all.left - 2 || own.right > all.right + 2;
  });
  parent.postMessage([
    "width=" + innerWidth,
    "scrolls=" + document.documentElement.scrollWidth,
    "outside=" + outside.map((each) => each.tagName + "." + each.className).join("+"),
    "cut=" + cut.map((each) => each.textContent).join("+"),
    "smallest=" + Math.min(...texts).toFixed(1),
    "drawings=" + drawings.length,
    "requests=" + performance.getEntriesByType("resource").length,
  ].join("; "), "*");
});
</script>
"""


def framed(page: str, widths: Sequence[int], height: int) -> str:
    """A page in frames of those widths: a browser's own window is never narrower than 500 pixels.

    What a script in the page sends to its parent is put into the title, one after the other.
    """
    encoded = base64.b64encode(page.encode()).decode()
    frames = [
        f'<iframe src="data:text/html;base64,{encoded}" style="width: {width}px"></iframe>'
        for width in widths
    ]
    return (
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        "<style>html, body { margin: 0; overflow: hidden; }"
        f"iframe {{ display: block; border: 0; height: {height}px; }}</style><title></title>"
        "<script>"
        'addEventListener("message", (event) => { document.title += event.data + "|"; });'
        f"</script>{''.join(frames)}"
    )


def chromium(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    return subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--hide-scrollbars", "--enable-logging=stderr"),
            # Nothing outside this machine answers, whatever a page may ask for.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            *options,
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a page wrote to the browser's console, refused requests among it."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(folder: Path, page: str) -> dict[str, dict[str, str]]:
    """What a script finds that looks at the page from within, by the width of the page."""
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert without_policy != page
    file = folder / "measured.html"
    inner = without_policy.replace("</head>", MEASURE + "</head>")
    file.write_text(framed(inner, WIDTHS, 800), encoding="utf-8")
    options = (f"--window-size={max(WIDTHS)},2400", "--virtual-time-budget=5000", "--dump-dom")
    done = chromium(folder, *options, file.as_uri())
    assert complaints(done) == []
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[:500]
    found = [
        dict(part.split("=", 1) for part in each.split("; "))
        for each in title[1].split("|")
        if each
    ]
    return {each["width"]: each for each in found}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_sticks_out_and_nothing_is_cut(tmp_path: Path, name: str) -> None:
    found = measured(tmp_path, PAGES[name]())

    assert set(found) == set(map(str, WIDTHS))
    for width, each in found.items():
        assert each["scrolls"] == width
        assert each["outside"] == ""
        assert each["cut"] == ""
        assert each["requests"] == "0"
        assert int(each["drawings"]) > 0
        # CSS pixels; a line of text of 12.5 pixels is taller than that.
        assert float(each["smallest"]) >= 12


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", [DARK, LIGHT])
def test_it_looks_like_something(tmp_path: Path, width: int, scheme: int) -> None:
    """As it is, its security policy included: the frame has none that could replace it."""
    page, image = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(framed(PAGES["illustrated"](), [width], 2400), encoding="utf-8")
    done = chromium(
        tmp_path,
        f"--window-size={max(width, 500)},2400",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--screenshot={image}",
        page.as_uri(),
    )
    assert complaints(done) == []
    with Image.open(image) as opened:
        drawn = opened.convert("RGB").crop((0, 0, width, 2400))
    counted = sorted(drawn.getcolors(1 << 24) or [], reverse=True)
    paper = counted[0][1]

    # Text and plots leave most of it paper, and a good deal of it not.
    assert paper == ((255, 255, 255) if scheme == LIGHT else (20, 23, 28))
    assert 0.03 < 1 - counted[0][0] / (width * 2400) < 0.6
    assert len(counted) > 100
    # The accent is there: the bars that passes took away.
    assert ((31, 95, 208) if scheme == LIGHT else (122, 167, 255)) in [each for _, each in counted]


def test_it_prints_with_everything_that_was_folded_up(tmp_path: Path) -> None:
    page, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(PAGES["illustrated"](), encoding="utf-8")
    done = chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri())

    assert complaints(done) == []
    content = printed.read_bytes()
    assert content.startswith(b"%PDF-")
    # 97 layers of engines and 58 rewritten places alone fill more than that.
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 7
