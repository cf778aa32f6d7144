"""The report in a real browser, on a phone, on a wide screen and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.probes.browser import Browser, find_chromium, start_browser

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

WIDTHS = {"phone": 390, "wide": 1400}


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with start_browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as running:
        yield running


SIZES = """[...document.querySelectorAll('.chart')].map(c => {
  const box = c.querySelector('.main-svg').getBoundingClientRect();
  const own = c.getBoundingClientRect();
  return [box.width, box.height, own.right, own.width, c.querySelectorAll('.trace, .heatmaplayer image').length];
})"""


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_nothing_complains_of_nothing_and_fits(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    sizes = browser.evaluate(SIZES)
    assert len(sizes) == 8  # two positions, one map, four metrics, one projection
    for drawn_width, height, right, own_width, n_traces in sizes:
        assert drawn_width == pytest.approx(own_width, abs=2) and height > 200 and right <= width
        assert n_traces > 0
    assert browser.evaluate("getComputedStyle(document.querySelector('.paper-only')).display") == "none"


def test_the_panels_stand_side_by_side_on_a_wide_screen_and_under_one_another_on_a_phone(
    browser: Browser, page: Path
) -> None:
    tops = (
        "[...document.querySelectorAll('[data-group=curves] .chart')].map(c => c.getBoundingClientRect().top)"
    )
    browser.open(page, width=1400)
    assert len(set(browser.evaluate(tops))) == 1
    browser.open(page, width=390)
    assert len(set(browser.evaluate(tops))) == 2


def test_the_slider_moves_through_the_layers(browser: Browser, page: Path) -> None:
    browser.open(page, width=1400)
    shown = "document.getElementById('layer-name').textContent"
    first_x = "document.getElementById('projection').data[0].x[0]"
    assert browser.evaluate(shown).startswith("layer 1, AUROC ")
    at_best = browser.evaluate(first_x)
    browser.evaluate("document.getElementById('layer-slider').focus()")
    for key in ("ArrowLeft", "ArrowLeft"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=37)
        browser.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=37)
    assert browser.evaluate(shown).startswith("embedding, AUROC ")
    assert browser.evaluate(first_x) != at_best
    assert browser.complaints() == []


def choose(browser: Browser, selector: str, value: int) -> None:
    browser.evaluate(
        f"(() => {{ const s = document.querySelector('{selector}'); s.value = '{value}';"
        " s.dispatchEvent(new Event('change')); })()"
    )


def test_metrics_and_projections_can_be_chosen(browser: Browser, page: Path) -> None:
    browser.open(page, width=1400)
    highest = "Math.max(...document.querySelector('[data-group=curves] .chart').data.flatMap(t => t.y))"
    options = browser.evaluate(
        "[...document.querySelector('[data-group=curves] select').options].map(o => o.text)"
    )
    assert options[0] == "AUROC" and "Log-loss" in options
    before = browser.evaluate(highest)
    choose(browser, "[data-group=curves] select", options.index("Log-loss"))
    assert browser.evaluate(highest) != before
    names = browser.evaluate(
        "[...document.querySelector('[data-projections] select').options].map(o => o.text)"
    )
    assert names == ["PCA, position last", "PCA, position image", "t-SNE, position image"]
    choose(browser, "[data-projections] select", 2)
    assert browser.evaluate("document.querySelector('.slide').hidden")  # one layer: nothing to slide over
    assert browser.complaints() == []


def test_points_of_both_classes_are_to_be_seen(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, width=1400)
    browser.screenshot(tmp_path / "page.png")
    box = browser.evaluate(
        "(b => [b.left, b.top, b.right, b.bottom])(document.getElementById('projection').getBoundingClientRect())"
    )
    left, top, right, bottom = map(int, box)
    image = Image.open(tmp_path / "page.png").convert("RGB").crop((left, top, right, bottom))
    pixels = np.asarray(image, np.float64)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        over_white = 255 - 0.65 * (255 - np.array(colour))
        assert (abs(pixels - over_white).max(2) < 12).sum() > 100


def test_paper_and_pages_without_scripts_get_the_figures(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    shown = "[...document.querySelectorAll('{}')].filter(e => e.getBoundingClientRect().height > 50).length"
    browser.open(page, width=1400)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate(shown.format("figure img")) == 5
    assert browser.evaluate(shown.format(".chart")) == 0
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="screen")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.reload")
        browser.wait_for("document.readyState === 'complete'")
        assert browser.evaluate(shown.format("figure img")) == 5
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
