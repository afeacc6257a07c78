"""Text of models, servers and files on a terminal: it is shown, and neither obeyed nor read as markup.

console.print(visible_text(answer))     # an answer with ESC[2J in it shows "\\u001b[2J", and clears no screen
print(visible(masked(str(error))), file=sys.stderr)
"""

from __future__ import annotations

import re

from rich.style import Style
from rich.text import Text

# Control characters but for newline and tab; what turns the direction of writing; other line ends; halves of characters, which
# cannot be printed.
_UNSEEN = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """``text`` with its control characters as JSON escapes them, so that JSON stays what it is. Newlines and tabs stay.

    >>> print(visible("\\x1b[31mred\\u202e"))
    \\u001b[31mred\\u202e
    """
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text).replace("\r\n", "\n")


def visible_text(text: str, style: str | Style = "") -> Text:
    """The same for Rich, which takes no "[bold]" in it for markup."""
    return Text(visible(text), style=style)
