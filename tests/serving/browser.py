"""A real browser for the tests of the page: Debian's chromium, or Chrome; everything that goes wrong in it is noted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from gemify.serving.routes.health import read_page_file

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !parent.checkVisibility()) continue;
    if (parent.closest(".hidden, .skip, button:disabled, title, noscript")) continue;
    const style = getComputedStyle(parent);
    const ink = light(rgba(parent.namespaceURI.endsWith("svg") ? style.fill : style.color));
    const paper = light(ground(parent));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${parent.tagName}.${parent.className} ${text.slice(0, 40)}`);
  }
  return found;
}"""
"""Texts of the page that stand out less than 4.5 to 1 from their ground (WCAG AA)."""

_WATCH = """
  window.violations = [];
  document.addEventListener("securitypolicyviolation", (event) =>
    violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@contextmanager
def browsing() -> Iterator[Browser]:
    """A headless browser; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'gemify[dev]'")
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextmanager
def open_page_files(browser: Browser) -> Iterator[Page]:
    """The page's files without a server behind them, for what its modules do alone."""

    def answer(route: Any) -> None:
        body, headers = read_page_file(route.request.url.rpartition("/")[2] or "index.html")
        route.fulfill(body=body, headers=headers)

    context = browser.new_context()
    context.route("http://page.test/**", answer)
    context.route("http://page.test/v1/**", lambda route: route.abort())
    page = context.new_page()
    page.goto("http://page.test/")
    yield page
    context.close()


class Visit:
    """One look at the page in a fresh profile."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1280, scheme: Any = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.context.add_init_script(_WATCH)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.troubles: list[str] = []
        self.page.on("console", lambda m: self.troubles.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.troubles.append("a dialog"), dialog.dismiss()))
        self.page.on("request", lambda r: None if r.url.startswith(url) else self.troubles.append(f"asks {r.url}"))
        self.page.goto(url)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).last.text_content() or ""

    def check(self) -> None:
        """Nothing wider than the screen, nothing hard to read, nothing forbidden, no error."""
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert self.page.evaluate(CONTRAST) == []
        assert self.page.evaluate("violations") == []
        assert self.troubles == []
