"""The documentation site: built strictly, every link leads somewhere, readable on a phone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.browser import Browser, find_chromium, open_browser
from tests.support.markdown_pages import PAGES, ROOT

pytestmark = pytest.mark.slow
CHROMIUM = find_chromium()
LOOKED_AT = ("index", "tutorial", "results", "attacks", "reference/configuration")


class Links(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.targets.add(value)
            if value and name in ("id", "name"):
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if made := os.environ.get("FEDPDM_SITE"):  # by `make docs`, a moment ago
        return Path(made)
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_what_is_filled_in_is_there(site: Path) -> None:
    keys = (site / "reference" / "configuration.html").read_text().replace("<wbr>", "")
    assert "<code>privacy.clip_norm</code>" in keys
    assert "train_coarse" in (site / "reference" / "python.html").read_text()
    assert "fedpdm privacy" in (site / "reference" / "command-line.html").read_text()
    made = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    assert {p.removeprefix("docs/")[:-3] for p in PAGES if p.startswith("docs/")} <= made


def test_every_link_leads_to_a_page_and_an_anchor_of_it(site: Path) -> None:
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    broken, seen = [], 0
    for page, links in pages.items():
        if page.name == "404.html":  # its links are from the root of wherever the site is put
            continue
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            seen += 1
            place = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            there = place.is_file() and (
                not parts.fragment
                or place not in pages
                or unquote(parts.fragment) in pages[place].anchors
            )
            if not there:
                broken.append(f"{page.relative_to(site)}: {target}")
    assert broken == []
    assert seen > 500


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert re.findall(r'<(?:script|img|iframe)[^>]* src="https?://', text) == []
        assert re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect)"[^>]*https?://', text) == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with open_browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("page", LOOKED_AT)
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_their_pictures_are_there(
    site: Path, browser: Browser, page: str, width: int
) -> None:
    browser.errors.clear()
    browser.open(site / f"{page}.html", width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.images].filter(i => !i.naturalWidth).length") == 0
    assert browser.errors == []
    tabs = "getComputedStyle(document.querySelector('.md-tabs')).display !== 'none'"
    menu = tabs.replace(".md-tabs", ".md-header label[for=__drawer]")
    assert (browser.run(tabs), browser.run(menu)) == (width > 1220, width < 1220)


def test_the_sites_colours_are_the_readers(site: Path, tmp_path: Path) -> None:
    """Somebody who has never been there, and whose machine is set to dark."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with open_browser(CHROMIUM, tmp_path / "profile") as fresh:
        fresh.open(site / "index.html", width=1280, dark=True)
        deadline, scheme = time.monotonic() + 10.0, None
        while scheme != "slate" and time.monotonic() < deadline:
            scheme = fresh.run("document.body.dataset.mdColorScheme")
            time.sleep(0.05)
    assert scheme == "slate"
