"""What MkDocs calls while it builds the site: pages as its Markdown reads them, docstrings without
Sphinx' roles.

Pages say in a fence's first line what the block is for: "```toml ferries.toml" is a file, "```bash
slow" needs models (CONTRIBUTING.md). GitHub shows such fences as they are. Python-Markdown takes
them for text, so a file's name becomes a title here, and the rest goes.
"""

from __future__ import annotations

import re
from typing import Any

FENCE = re.compile(r"^(?P<ticks>```)(?P<language>\w+) +(?P<note>.+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text with fences that Python-Markdown reads."""
    return FENCE.sub(_plain, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The page's HTML with ``:class:`Name` `` of a docstring as the name alone."""
    return re.sub(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)", "", html)


def _plain(found: re.Match[str]) -> str:
    note = found["note"]
    title = f' title="{note}"' if re.fullmatch(r"[\w/.-]+\.\w+", note) else ""
    return f"{found['ticks']}{found['language']}{title}"
