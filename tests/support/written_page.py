"""A written page as tests read it: its scripts, its text, every address that it could ask for, and
the marks of its charts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree


class Page(HTMLParser):
    """What a browser would make of the page: its scripts, its text, and every address that it could
    ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self._raw: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [
            found[key] or "" for key in ("src", "href", "srcset", "data") if key in found
        ]
        self.handlers += [key for key in found if key.startswith("on")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        self._raw = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((found, ""))

    def handle_endtag(self, tag):
        self._raw = None

    def handle_data(self, data):
        if self._raw == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._raw is None:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def data(self, name: str) -> dict:
        return next(
            json.loads(text) for found, text in self.scripts if found.get("id") == f"{name}-data"
        )

    def row(self, name: str, index: int = 0) -> list[tuple[str, str]]:
        """Label and text of each step of a row in the list of that name."""
        found = self.data(name)
        return [
            (found["texts"][label], found["texts"][text])
            for label, text, *_ in found["rows"][index][2]
        ]


def titles(drawing: str) -> list[str]:
    """What the marks of all drawings in the text say, in their order."""
    return [title.text or "" for chart in svgs(drawing) for title in chart.iter("title")]


def svgs(html: str) -> list[ElementTree.Element]:
    """The drawings in a page, parsed."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", html, re.DOTALL)]
