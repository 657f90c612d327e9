"""The report's page in a real headless Chromium, at laptop and phone width."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import forks
from separable import small

chromium = pytest.importorskip("chromium", reason="websocket-client is not installed")

BINARY = chromium.find_chromium()
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium on PATH: apt-get install chromium"
)
SIZES = {"laptop": (1366, 768, False), "phone": (390, 844, True)}
HOSTILE = "</script><img src=x onerror=alert(1)>"

OUTSIDE = """
[...document.querySelectorAll('main *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1)
    && !e.closest('svg') && !e.closest('.hoverlayer') && !e.closest('thead');
}).map(e => e.tagName + '.' + e.className).slice(0, 5)
"""
CHARTS = """
Object.fromEntries([...document.querySelectorAll('.chart')].map(e => [e.id, {
  svg: e.querySelectorAll('svg.main-svg').length,
  marks: e.querySelectorAll('.point, .xy image, .heatmaplayer image').length,
  width: e.querySelector('svg.main-svg')?.getBoundingClientRect().width ?? 0,
  room: e.getBoundingClientRect().width,
}]))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small build, one of whose labels is meant to break out of it."""
    folder = tmp_path_factory.mktemp("page")
    out = folder / "out"
    config = small().yaml(
        folder / "build.yaml", out=str(out), strategy="milp", budget_s=20,
        tiers={"high": {"drop": 0.5}, "fast": {"drop": 30}, "free": {}},
    )  # fmt: skip
    assert forks().samp("build", "-c", config, "--json").code in (0, 1)
    manifest = out / "current" / "manifest.json"
    body = json.loads(manifest.read_text())
    body["labels"] = [HOSTILE, "fine"]
    manifest.write_text(json.dumps(body))
    assert forks().samp("report", out).code == 0
    # Alone in its folder: there is nothing beside it that it could load.
    return Path(shutil.copy(out / "report.html", folder / "alone.html"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Tab]:
    assert BINARY is not None
    with chromium.tab(BINARY, tmp_path_factory.mktemp("chromium") / "profile") as made:
        yield made


@pytest.mark.parametrize("size", SIZES)
def test_it_draws_offline_without_a_complaint(
    size: str, page: Path, tab: chromium.Tab, pictures: Path
) -> None:
    tab.complaints.clear()
    tab.asked.clear()
    width, height, phone = SIZES[size]
    tab.open(page.as_uri(), width, height, phone)
    tab.screenshot(pictures / f"{size}.png")
    charts = tab.js(CHARTS)
    figures = tab.js("Object.keys(JSON.parse(document.getElementById('figures').textContent))")
    assert set(charts) == set(figures)
    assert {"chart-front", "chart-tests", "chart-plan-0", "chart-loss", "chart-errors"} <= set(
        charts
    )
    for name, chart in charts.items():
        assert chart["svg"] >= 1, name
        assert chart["marks"] >= 1, name
        assert 200 < chart["width"] <= chart["room"] + 1, name
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert tab.js(OUTSIDE) == []
    assert tab.complaints == []
    assert {url for url in tab.asked if not url.startswith(("data:", "blob:"))} == {page.as_uri()}


def test_the_other_view_and_back(page: Path, tab: chromium.Tab) -> None:
    tab.complaints.clear()
    tab.open(page.as_uri(), 1366, 768)
    look = "JSON.stringify(document.getElementById('chart-front').data.map(t => t.y))"
    title = "document.querySelector('#chart-front .ytitle').textContent"
    before = tab.js(look)
    assert tab.js(title) == "points lost at most"
    tab.js("document.querySelector('[data-view=measured]').click()")
    tab.wait(f"{title} === 'points lost, as measured'")
    assert tab.js(look) != before
    assert tab.js("document.querySelector('[data-view=measured]').ariaPressed") == "true"
    tab.js("document.querySelector('[data-view=bound]').click()")
    tab.wait(f"{title} === 'points lost at most'")
    assert tab.js(look) == before
    assert tab.complaints == []


def test_a_hover_says_why(page: Path, tab: chromium.Tab) -> None:
    tab.open(page.as_uri(), 1366, 768)
    tab.js("document.getElementById('chart-loss').scrollIntoView({block: 'center'})")
    box = tab.js(
        "(b => ({x: b.x + b.width * 0.3, y: b.y + b.height * 0.5}))"
        "(document.querySelector('#chart-loss .heatmaplayer').getBoundingClientRect())"
    )
    for step in (0, 2):  # plotly answers to movement
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + step, y=box["y"])
    tab.wait("document.querySelector('#chart-loss .hovertext') !== null")
    told = tab.js("document.querySelector('#chart-loss .hovertext').textContent")
    assert "layer.1." in told
    assert "nats" in told


def test_a_hostile_label_is_text(page: Path, tab: chromium.Tab) -> None:
    tab.open(page.as_uri(), 1366, 768)
    assert HOSTILE in tab.js("document.querySelector('#origin ~ dl').textContent")
    assert tab.js("document.querySelectorAll('main img').length") == 0


def test_the_policy_stops_what_the_page_did_not_bring(page: Path, tab: chromium.Tab) -> None:
    """The page could not fetch anything even if it tried."""
    tab.open(page.as_uri(), 1366, 768)
    tried = "fetch('https://example.org/').then(() => 'went out', e => e.name)"
    assert tab.js(tried) == "TypeError"
    assert [text for text in tab.complaints if "Content Security Policy" in text]
