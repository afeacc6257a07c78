"""What MkDocs calls while it builds the site: pages as its Markdown reads them, docstrings without
Sphinx' roles.

Pages say in a fence's first line what the block is for: "```toml ferries.toml" is a file, "```bash
slow" needs models (CONTRIBUTING.md). GitHub shows such fences as they are. Python-Markdown takes
them for text, so a file's name becomes a title here, and the rest goes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# The theme's search from a folder fetches this from another server; file_worker.js does it here.
SHIM = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
WORKER = Path(__file__).with_name("file_worker.js")
FENCE = re.compile(r"^(?P<ticks>```)(?P<language>\w+) +(?P<note>.+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text with fences that Python-Markdown reads."""
    return FENCE.sub(_plain, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The page's HTML with ``:class:`Name` `` of a docstring as the name alone."""
    return re.sub(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)", "", html)


def on_post_page(output: str, **_: Any) -> str:
    """The whole page, with a search that works from a folder and asks no server."""
    return output.replace(SHIM, f"<script>{WORKER.read_text(encoding='utf-8')}</script>")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same of the page for what is not found."""
    return on_post_page(output_content)


def _plain(found: re.Match[str]) -> str:
    note = found["note"]
    title = f' title="{note}"' if re.fullmatch(r"[\w/.-]+\.\w+", note) else ""
    return f"{found['ticks']}{found['language']}{title}"
