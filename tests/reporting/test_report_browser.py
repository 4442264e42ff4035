"""The page in a real browser: no sideways scrolling, by keyboard alone, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpdm.reporting.page import read_run, write_report
from tests.support.browser import Browser, find_chromium, open_browser
from tests.support.reports import made_attacks, made_run

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

SCREENS = {"desktop": 1200, "phone": 390, "small phone": 320}
# Ratio of luminances of each text element and what is behind it (WCAG 2.2, 1.4.3).
CONTRAST = """
(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const channel = v => linear(v / 255);
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (!getComputedStyle(e).backgroundColor.startsWith("rgb")) continue;
      if (c.length === 3 || c[3] === 1) return c;
    }
  };
  const worst = {};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = e.tagName + "." + e.className;
    worst[name] = Math.min(worst[name] ?? 99, ratio);
  }
  return worst;
})()
"""


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with long names, one with models and attacks."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(finished_run, folder / "trained")
    made_attacks(folder / "trained" / "attacks")
    made_run(folder / "b", name="a-name-that-is-long-enough-to-be-wider-than-any-phone" * 2)
    runs = [read_run(folder / name) for name in ("trained", "b")]
    return write_report(runs, folder / "page.html", say=lambda line: None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("width", SCREENS.values(), ids=SCREENS)
def test_nothing_is_wider_than_the_screen(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("scrollTo(500, 0)")
    assert browser.run("scrollX") == 0


def test_nothing_is_fetched_and_nothing_fails(browser: Browser, page: Path) -> None:
    browser.requests.clear()
    browser.errors.clear()
    browser.open(page, width=1200)
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [page.as_uri()]
    assert browser.errors == []
    broken = "[...document.images].filter(i => !i.naturalWidth && i.offsetParent).length"
    assert browser.run(broken) == 0


def test_the_policy_is_in_force(browser: Browser, page: Path, tmp_path: Path) -> None:
    """A planted script and a planted picture from elsewhere do nothing."""
    planted = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x.png' alt=''>"
    copy = tmp_path / "planted.html"
    copy.write_text(page.read_text().replace("<footer>", f"<footer>{planted}"))
    browser.errors.clear()
    browser.open(copy, width=1200)
    assert browser.run("document.title") != "taken"
    assert browser.run("document.querySelectorAll('.film.live').length") == 1
    assert len([e for e in browser.errors if "Content Security Policy" in e]) == 2
    browser.errors.clear()


def focus(browser: Browser, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(80):
        browser.press("Tab", 9)
        if browser.run(f"document.activeElement.matches({selector!r})"):
            return
    raise AssertionError(f"{selector} cannot be reached with the Tab key")


SHOWN = "[...document.querySelectorAll('.film li')].map((li, k) => li.hidden ? -1 : k)"


def visible(browser: Browser) -> list[int]:
    return [index for index in browser.run(SHOWN) if index >= 0]


def test_the_slider_works_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    frames = browser.run("document.querySelectorAll('.film li').length")
    assert visible(browser) == [0]
    focus(browser, ".film input")
    for expected in range(1, frames):
        browser.press("ArrowRight", 39)
        assert visible(browser) == [expected]
        said = browser.run("document.querySelector('.film output').textContent")
        assert said == browser.run("document.activeElement.getAttribute('aria-valuetext')")
        assert said.startswith(f"Step {expected} of ")
    assert "finished" in said
    browser.press("Home", 36)
    assert visible(browser) == [0]
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_button_plays_to_the_end_and_stops(browser: Browser, page: Path) -> None:
    browser.open(page, width=1200)
    frames = browser.run("document.querySelectorAll('.film li').length")
    focus(browser, ".film button")
    browser.press(" ", 32)
    assert browser.run("document.activeElement.textContent") == "Pause"
    done = "document.activeElement.textContent === 'Play'"
    wait = f"new Promise(r => {{ const f = () => {done} ? r(true) : setTimeout(f, 50); f(); }})"
    assert browser.run(wait) is True
    assert visible(browser) == [frames - 1]


def test_wide_tables_scroll_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, width=320)
    focus(browser, ".split")
    assert browser.run("document.activeElement.scrollWidth > document.activeElement.clientWidth")
    browser.press("ArrowRight", 39)
    wait = "new Promise(r => setTimeout(() => r(document.activeElement.scrollLeft), 600))"
    assert browser.run(wait) > 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, width=1200, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    light = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light is not dark
    ratios = browser.run(CONTRAST)
    assert len(ratios) > 15
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.slow
def test_without_the_script_every_frame_is_there(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "still.html"
    copy.write_text(page.read_text().replace('"use strict";', '"use strict" ;'))  # wrong digest
    browser.open(copy, width=390)
    browser.errors.clear()
    frames = browser.run("document.querySelectorAll('.film li').length")
    assert visible(browser) == list(range(frames))
    assert browser.run("document.querySelector('.film .controls').hidden") is True
    assert browser.run("document.documentElement.scrollWidth") <= 390
