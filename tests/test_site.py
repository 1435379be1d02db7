"""The built site in a browser: what a reader sees on a screen and a telephone, by day and night.

    make site        builds the documentation and runs this; needs Chromium or Chrome

Any request that leaves this machine fails the test.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Pages of source code are listings.
PAGES = sorted(
    str(page.relative_to(SITE)) for page in SITE.rglob("*.html") if "_modules" not in page.parts
)
SIZES = {"screen": (1366, 768), "telephone": (390, 844)}

# What is seen of the page: its prose without code and formulas, and how wide it is.
LOOK = """() => {
  const copy = document.querySelector("article").cloneNode(true);
  copy.querySelectorAll("pre, code, math, script").forEach(node => node.remove());
  return {
    prose: copy.textContent,
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    formulas: document.querySelectorAll("math").length,
    broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    anchors: [...document.querySelectorAll("[id]")].map(node => node.id),
  };
}"""


@pytest.fixture(scope="module")
def address():
    assert PAGES, "the site is not built: make docs"
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    paths = [path for path in map(shutil.which, BROWSERS) if path]
    assert paths, f"no browser found, of {', '.join(BROWSERS)}"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=paths[0], args=["--no-sandbox"])


@pytest.fixture
def context(browser, address, request):
    """A window, of the size and colours that were asked for, that reaches the site alone."""
    size, colours = getattr(request, "param", ("screen", "light"))
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours)
    context.problems = []

    def allow(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            context.problems.append(f"asked for {route.request.url}")
            route.abort()

    context.route("**/*", allow)
    yield context
    context.close()


def opened(context, url):
    page = context.new_page()
    page.on("pageerror", lambda error: context.problems.append(str(error)))
    page.on("console", lambda m: m.type == "error" and context.problems.append(m.text))
    page.goto(url)
    return page


@pytest.mark.parametrize(
    "context",
    [(size, colours) for size in SIZES for colours in ("light", "dark")],
    indirect=True,
    ids="-".join,
)
def test_every_page_shows_what_it_should(context, address):
    found = {}
    for name in PAGES:
        page = opened(context, address + name)
        found[name] = page.evaluate(LOOK)
        page.close()
    assert context.problems == []
    for name, seen in found.items():
        assert seen["wider"] <= 0, f"{name} scrolls sideways by {seen['wider']} pixels"
        assert seen["broken"] == [], name
        for odd in ("\\frac", "\\sum", "\\(", "$$", ":::", "{func}", ".. math"):
            assert odd not in seen["prose"], (name, odd)
        for link in seen["links"]:
            url, _, anchor = link.partition("#")
            target = url.removeprefix(address).partition("?")[0]
            if url.startswith(address) and target in found and anchor:
                assert anchor in found[target]["anchors"], (name, link)
            elif url.startswith(address):
                assert (SITE / target).exists(), (name, link)
    assert found["how-it-works.html"]["formulas"] > 30


LIMITS_OF_SUMS = """() => [...document.querySelectorAll("munderover")].map(sum => {
  const [sign, below, above] = [...sum.children].map(part => part.getBoundingClientRect());
  return [above.bottom - sign.top, sign.bottom - below.top];
})"""


def test_formulas_are_laid_out_by_the_font_that_comes_along(context, address):
    page = opened(context, address + "how-it-works.html")
    status = """() => document.fonts.ready.then(
        fonts => [...fonts].filter(f => f.family.includes("STIX")).map(f => f.status))"""
    assert page.evaluate(status) == ["loaded"]
    overlaps = page.evaluate(LIMITS_OF_SUMS)
    assert overlaps
    assert max(map(max, overlaps)) < 1, overlaps


def test_night_is_dark(browser, address):
    shades = {}
    for colours in ("light", "dark"):
        context = browser.new_context(color_scheme=colours)
        page = context.new_page()
        page.goto(address + "index.html")
        shades[colours] = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        context.close()
    assert shades["light"] == "rgb(255, 255, 255)"
    assert max(map(int, shades["dark"][4:-1].split(", "))) < 40


def test_search_finds_the_loss_first(context, address):
    page = opened(context, address + "search.html?q=FeatureAdversarialLoss")
    page.wait_for_selector("ul.search li a")
    first = page.locator("ul.search li a").first
    assert "FeatureAdversarialLoss" in first.inner_text()
    assert "api/loss.html" in first.get_attribute("href")
    assert context.problems == []


def test_the_copy_button_copies_lines_that_run(context, address, tmp_path):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = opened(context, address + "index.html")
    page.locator("div.highlight").first.hover()
    page.locator("button.copybtn").first.click()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert "Distiller(student, teacher" in copied
    script = tmp_path / "copied.py"
    script.write_text(copied, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
