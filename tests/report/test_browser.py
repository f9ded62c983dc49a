"""The report of a real run in a real browser: nothing is asked for or complained of, and it fits a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lct_fast.cli import main
from lct_fast.report import write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
# Of the browser's own doings none, which a test of what a page asks for could not tell from the page's.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECTIONS = ("comparison", "curves", "gradients", "bytes", "codebooks", "timelines")

# The smallest text in pixels as it is drawn, of the page and of charts, which are scaled.
SMALLEST_TEXT = """
const sizes = [];
for (const e of document.querySelectorAll("body *")) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.closest("title")) continue;
  const svg = e.closest("svg");
  if (!e.getClientRects().length) continue;
  const scale = svg && svg.viewBox.baseVal.width
    ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  sizes.push([parseFloat(getComputedStyle(e).fontSize) * scale, e.textContent.trim().slice(0, 40)]);
}
return sizes.sort((a, b) => a[0] - b[0])[0];
"""
# Text of a chart that reaches over its edge, where it would be cut off.
CUT_TEXT = """
const cut = [];
for (const e of document.querySelectorAll("svg[role=img] text")) {
  const r = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
  if (r.left < s.left - 1 || r.right > s.right + 1 || r.top < s.top - 2 || r.bottom > s.bottom + 2)
    cut.push(e.textContent);
}
return cut;
"""
# Contrast of the text with what is behind it, the lowest of the page outside of charts (WCAG 2).
LOWEST_CONTRAST = """
const channel = v => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number);
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (c !== "rgba(0, 0, 0, 0)") return c; } return "rgb(255, 255, 255)"; };
let lowest = 99;
for (const e of document.querySelectorAll("h1, h2, h3, p, a, th, td, caption, summary, figcaption, li")) {
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
  lowest = Math.min(lowest, (a + 0.05) / (b + 0.05));
}
return lowest;
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of four groups with everything there is to show, and of one without exits."""
    folder = tmp_path_factory.mktemp("runs")
    options = [
        "train",
        "--data",
        "digits",
        "--model",
        "digits_cnn:width=0.25",
        "--limit",
        "640",
        "--threads",
        "1",
    ]
    options += ["--epochs", "2", "--json"]
    four = ["--groups", "4", "--codec", "vq:16,2", "--diagnose", "3"]
    assert main([*options, *four, "--out", str(folder / "four")]) == 0
    assert main([*options, "--method", "backprop", "--out", str(folder / "whole")]) == 0
    return write([folder / "four", folder / "whole"], folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    started.set_page_load_timeout(60)
    started.set_script_timeout(60)
    yield started
    started.quit()


def _open(browser: Any, page: Path, width: int, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())


def _asked_for(browser: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_is_there_and_fits(browser: Any, page: Path, width: int, scheme: str) -> None:
    _open(browser, page, width, scheme)
    assert browser.get_log("browser") == [], "errors, warnings, refusals of the page's policy"
    assert _asked_for(browser) == [page.as_uri()]
    inner, wide = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width and wide <= width
    for name in SECTIONS:
        section = browser.find_element("css selector", f"section[aria-labelledby={name}]")
        assert section.is_displayed() and section.rect["height"] > 100 and 0.8 * width < section.rect["width"]
        links = browser.find_elements("css selector", f'nav a[href="#{name}"]')
        assert [link.is_displayed() for link in links] == [True]
    for name in ("svg[role=img]", "table"):
        drawn = browser.find_elements(
            "css selector", f"section > div {name}, figure > {name}, .timeline > {name}"
        )
        sizes = [e.size for e in drawn if e.is_displayed()]
        assert len(sizes) >= 4 and all(s["width"] > 50 and s["height"] > 10 for s in sizes), name
    assert browser.execute_script(CUT_TEXT) == []
    smallest, text = browser.execute_script(SMALLEST_TEXT)
    assert smallest >= 13, text
    assert browser.execute_script(LOWEST_CONTRAST) >= 4.5
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgb()").split(","))) > 380) == (scheme == "light")


def test_a_page_that_asks_for_something_is_seen(browser: Any, tmp_path: Path) -> None:
    """The checks above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><link rel="icon" href="data:,">'
        '<img src="other.png"><p style="width: 5000px">wide</p>'
    )
    _open(browser, bad, 390, "light")
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
    bad.write_text(
        '<link rel="icon" href="data:,"><img src="other.png"><div style="width: 5000px">wide</div>'
    )
    _open(browser, bad, 390, "light")
    assert any(url.endswith("other.png") for url in _asked_for(browser))
    assert browser.execute_script("return document.documentElement.scrollWidth") > 390
