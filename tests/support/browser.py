"""A real Chromium, without a window, for the tests of pages; they are skipped where there is none,
and say what to install."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE, PHONE = (1280, 900), (375, 812)


class Watched:
    """An open page and what it did that a page of ours must not: messages on the console, errors,
    requests beside its own file."""

    def __init__(self, page: Any, path: Path, fragment: str = "") -> None:
        self.page, self.faults = page, list[str]()
        page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if self._own(request.url, path)
                else self.faults.append(f"request: {request.url}")
            ),
        )
        page.goto(path.as_uri() + fragment)

    @staticmethod
    def _own(url: str, path: Path) -> bool:
        return url.partition("#")[0] == path.as_uri() or url == "data:,"

    def open_section(self, title: str) -> None:
        """Follows the link of the navigation with that title."""
        self.page.get_by_role("navigation").get_by_role("link", name=title, exact=True).click()

    def overflow(self) -> list[str]:
        """The elements that stick out of the window to the right, less those inside something that
        scrolls by itself."""
        return self.page.evaluate(
            """() => {
              const wide = document.documentElement.clientWidth + 1;
              const out = [...document.querySelectorAll("body *")].filter((node) =>
                node.getClientRects().length && node.getBoundingClientRect().right > wide
                && !node.closest(".wide, .skip, nav") && !node.closest("svg g"));
              const page = document.documentElement.scrollWidth > wide ? ["the page"] : [];
              return page.concat(out.map((node) => `${node.tagName}.${node.getAttribute("class")}`));
            }"""
        )


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser of playwright's; the test is skipped where there is none."""
    driver = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with driver.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def opened(
    running: Any,
    path: Path,
    size: tuple[int, int] = WIDE,
    scheme: str = "light",
    fragment: str = "",
) -> Iterator[Watched]:
    """The page at that path, and that fragment of it, in a window of that size; and no fault in the
    end."""
    context = running.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
    )
    try:
        watched = Watched(context.new_page(), path, fragment)
        yield watched
        assert watched.faults == []
    finally:
        context.close()
