"""Text of models, servers and files where it is shown or written: a terminal does not obey it, and
UTF-8 has a word for all of it.

console.print(visible_text(answer))     # an answer with ESC[2J in it shows "\\u001b[2J", and clears
no screen print(visible(masked(str(error))), file=sys.stderr)
file.write(without_half_pairs(answer))  # half of a surrogate pair, as a server can write it in
    JSON, becomes U+FFFD
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.style import Style
    from rich.text import Text

# Control characters but for newline and tab; what turns the direction of writing; other line ends;
# halves of characters, which cannot be printed.
_UNSEEN = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """``text`` with its control characters as JSON escapes them, so that JSON stays what it is.
    Newlines and tabs stay.

    >>> print(visible("\\x1b[31mred\\u202e"))
    \\u001b[31mred\\u202e
    """
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text).replace("\r\n", "\n")


def visible_text(text: str, style: str | Style = "") -> Text:
    """``text``, made visible, for Rich, which takes no "[bold]" in it for markup."""
    from rich.text import Text

    return Text(visible(text), style=style)


def printable(text: str) -> str:
    """``text`` in one line, as for names: what cannot be printed as Python escapes it,
    ``"\\x1b[2K"`` as ``"\\\\x1b[2K"``."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def has_half_pair(text: str) -> bool:
    """Whether half of a surrogate pair is in ``text``: UTF-8 has no word for it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def without_half_pairs(text: str) -> str:
    """``text`` as UTF-8 can say it: halves of a surrogate pair that stand together become their
    character, others U+FFFD.

    >>> without_half_pairs("one \\ud83d, two \\ud83d\\ude00")
    'one \ufffd, two \U0001f600'
    """
    return (
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if has_half_pair(text)
        else text
    )
