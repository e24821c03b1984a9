"""The site builds without a warning and loads nothing from other hosts. A browser opens every page: no error, pictures
load, no page is wider than a phone, text is legible in both color schemes, search finds, code can be copied.
"""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, executable

from x_transformers import Decoder

ROOT = Path(__file__).resolve().parents[1]
PHONE = 400
LEAST_CONTRAST = 4.5
"""Of text and its background, as WCAG 2 asks for (AA)."""

CONTRASTS = """
(() => {
  document.getAnimations().forEach(each => each.finish());
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = {};
  const read = color => known[color] ??= (() => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  })();
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const ground = node => {
    if (!node) return [255, 255, 255];
    const own = read(getComputedStyle(node).backgroundColor);
    return own[3] == 1 ? own.slice(0, 3) : over(own, ground(node.parentElement));
  };
  const worst = {};
  for (const node of document.querySelectorAll('.md-content *, .md-header *, .md-nav *, .md-footer *')) {
    const text = [...node.childNodes].filter(each => each.nodeType == 3).map(each => each.data.trim()).join(' ').trim();
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    if (!text || !box.width || style.visibility != 'visible' || node.matches('.headerlink, svg *')) continue;
    let opacity = 1;
    for (let each = node; each; each = each.parentElement) opacity *= getComputedStyle(each).opacity;
    if (opacity == 0) continue;
    const back = ground(node), front = read(style.color);
    const shown = over([...front.slice(0, 3), front[3] * opacity], back);
    const [low, high] = [light(shown), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    const name = node.tagName.toLowerCase() + (node.className ? '.' + String(node.className).replace(/ /g, '.') : '');
    if (ratio < (worst[name]?.[0] ?? LEAST)) worst[name] = [ratio, text.slice(0, 40)];
  }
  return Object.entries(worst).map(([name, [ratio, text]]) => `${name} ${ratio.toFixed(2)}: ${text}`);
})()
""".replace("LEAST", str(LEAST_CONTRAST))

PICTURES = "[...document.images].filter(each => !(each.complete && each.naturalWidth)).map(each => each.src)"
WIDER = """
document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll('.md-content *')].filter(each => each.getBoundingClientRect().right > innerWidth
    && !each.closest('.md-typeset__scrollwrap, pre')).map(each => each.outerHTML.slice(0, 80))
"""
WITHOUT_BUTTON = """
[...document.querySelectorAll('.md-content pre > code')].filter(each => !each.parentElement.parentElement.querySelector(
  '[data-clipboard-target], [data-md-type=copy]')).map(each => each.textContent.slice(0, 40))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def addresses(site: Path) -> list[str]:
    """The pages, relative to the site."""
    return sorted(path.parent.relative_to(site).as_posix() + "/" for path in site.rglob("index.html"))


def test_the_site_builds(site: Path) -> None:
    pages = {f"{path.stem}/" for path in (ROOT / "docs").glob("*.md")}
    assert set(addresses(site)) >= pages | {"./", "contributing/", "changelog/"}
    keywords = (site / "all-keywords" / "index.html").read_text(encoding="utf-8")
    for each in inspect.signature(Decoder).parameters.values():
        if each.kind is each.KEYWORD_ONLY and not each.name.startswith("cross_attn_"):
            assert f"<code>{each.name}</code>" in keywords, each.name


def test_nothing_comes_from_another_host(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*\bhref=\"(?:https?:)?//"
    )
    assert [path for path in site.rglob("*.html") if loads.search(path.read_text(encoding="utf-8"))] == []
    styles = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")
    assert [path for path in site.rglob("*.css") if styles.search(path.read_text(encoding="utf-8"))] == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    path = executable()
    if path is None:
        pytest.skip("there is no browser; Debian's package `chromium` has one")
    browser = Browser(path, tmp_path / "profile")
    yield browser
    browser.close()


def errors(browser: Browser, address: str) -> Iterator[str]:
    """What the page reported: errors, warnings, and requests to other hosts."""
    for method, given in browser.events:
        if method == "Runtime.exceptionThrown":
            yield given["exceptionDetails"]["text"]
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            yield str(given["args"])
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            yield given["entry"]["text"]
        elif method == "Network.requestWillBeSent" and not given["request"]["url"].startswith((address, "data:")):
            yield f"a request to {given['request']['url']}"


def look(browser: Browser, width: int, scheme: str) -> None:
    """Set the width of the page and the color scheme that its reader prefers."""
    shown = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width <= PHONE}
    browser.call("Emulation.setDeviceMetricsOverride", **shown)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


def test_every_page_in_a_browser(site: Path, address: str, browser: Browser) -> None:
    found: list[str] = []
    for page in addresses(site):
        look(browser, 1300, "light")
        browser.open(address + page)
        browser.wait_for("document.querySelector('.md-content h1') != null")
        faults = [*browser.run(CONTRASTS), *browser.run(WITHOUT_BUTTON), *browser.run(PICTURES)]
        look(browser, PHONE, "dark")
        browser.wait_for("document.body.dataset.mdColorScheme == 'slate'")
        faults += [*browser.run(CONTRASTS), *browser.run(WIDER), *errors(browser, address)]
        found += [f"{page}: {fault}" for fault in faults]
    assert not found, "\n".join(["", *found])


def test_search_finds(address: str, browser: Browser) -> None:
    look(browser, 1300, "light")
    browser.open(address)
    browser.wait_for("document.querySelector('input[name=query]') != null")
    typed = "const box = document.querySelector('input[name=query]'); box.focus(); box.value = 'rotary'"
    browser.run(f"(() => {{ {typed}; box.dispatchEvent(new KeyboardEvent('keyup', {{bubbles: true}})); }})()")
    hits = browser.wait_for("[...document.querySelectorAll('.md-search-result__link')].map(each => each.href)")
    assert any("positions/" in hit for hit in hits), hits
    assert list(errors(browser, address)) == []


def test_code_is_copied(address: str, browser: Browser) -> None:
    look(browser, 1300, "light")
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    browser.open(address + "positions/")
    code = browser.run("document.querySelector('.md-content pre > code').innerText")
    button = ".md-content [data-clipboard-target], .md-content [data-md-type=copy]"
    browser.wait_for(f"document.querySelector('{button}') != null")
    browser.run(f"document.querySelector('{button}').click()")
    browser.wait_for("navigator.clipboard.readText().then(text => text.includes('import torch'))")
    assert browser.run("navigator.clipboard.readText()").strip() == code.strip()
