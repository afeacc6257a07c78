"""The site of the documentation: it is built without a warning, asks no other server, and has every
public name."""

from __future__ import annotations

import functools
import http.server
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import cowest_dspy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# What a browser fetches by itself, and where its address stands. A link is only followed when
# somebody clicks on it.
FETCHED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    made = tmp_path_factory.mktemp("docs") / "site"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(made)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr, done.stderr
    return made


class Page(HTMLParser):
    """What a page makes a browser fetch, its links, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attrs}
        self.anchors |= {named[key] for key in ("id", "name") if key in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag in FETCHED and named.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.extend(named[key] for key in (FETCHED[tag], "srcset") if named.get(key))
        self.fetched.extend(re.findall(r"url\(['\"]?([^'\")]+)", named.get("style", "")))


def outside(address: str) -> bool:
    return bool(re.match(r"(\w+:)?//", address)) and not address.startswith("data:")


def test_nothing_is_fetched_from_another_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        assert [address for address in Page(path).fetched if outside(address)] == [], path
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"(?:url\(|@import )['\"]?([^'\")]+)", text)
        assert [address for address in found if outside(address)] == [], path


def test_links_of_the_site_lead_to_pages_and_places_that_are_there(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in page.links:
            if outside(link) or re.match(r"\w+:", link):
                continue
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, (
                    f"{path.relative_to(site)}: {link}"
                )


def public_names() -> Iterator[str]:
    """Every name that the package or one of its public folders offers."""
    yield from (f"cowest_dspy.{name}" for name in cowest_dspy.__all__)
    for module in pkgutil.iter_modules(cowest_dspy.__path__, "cowest_dspy."):
        if module.ispkg and not module.name.rpartition(".")[2].startswith("_"):
            offered = getattr(importlib.import_module(module.name), "__all__", ())
            yield from (f"{module.name}.{name}" for name in offered)


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    names = list(public_names())
    assert len(names) > 100
    assert [name for name in names if not known & {name, _home(name)}] == []


def _home(name: str) -> str:
    """Where what is named is defined: a function that is called as its file is known there."""
    module, _, plain = name.rpartition(".")
    return (
        f"{getattr(getattr(importlib.import_module(module), plain), '__module__', module)}.{plain}"
    )


def test_the_pages_from_the_code_are_what_the_code_says() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "docs/make_reference.py"), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\nRun `make reference`, and commit what it writes."


def test_every_key_of_a_toml_is_explained() -> None:
    rows = re.findall(
        r"^\| `.*$", (ROOT / "docs/reference/toml.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The site on loopback."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def searched(page: Any, text: str) -> list[str]:
    """What the search finds. It listens to keys, which are pressed once it is ready."""
    page.focus("input[name=query]")
    ready = "document.querySelector('.md-search-result__meta').textContent.includes('Type to')"
    page.wait_for_function(ready)
    page.locator("input[name=query]").press_sequentially(text)
    page.wait_for_selector(".md-search-result__item")
    return page.locator(".md-search-result__item").all_inner_texts()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt install chromium")
def test_a_browser_searches_it_and_asks_nobody_else(served: str) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on(
            "console",
            lambda message: said.append(message.text) if message.type == "error" else None,
        )
        page.goto(f"{served}/index.html")
        found = searched(page, "noise floor")
        assert page.get_attribute("body", "data-md-color-scheme") == "default"
        dark = browser.new_page(color_scheme="dark")
        dark.goto(f"{served}/index.html")
        dark.wait_for_selector("body[data-md-color-scheme=slate]")
        browser.close()
    assert any("noise" in text.lower() for text in found)
    assert said == []
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt install chromium")
def test_it_can_be_searched_when_it_is_opened_from_a_folder(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        found = searched(page, "noise floor")
        browser.close()
    assert any("noise" in text.lower() for text in found)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_search_knows_every_page(site: Path) -> None:
    known = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    assert pages <= {location or "index.html" for location in known}
