"""What the gate asks of texts: how long they are, whether two are nearly equal, whether one says an
answer."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Chinese and Japanese are written without spaces: each of their signs counts as a word.
_SIGN = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+")
_WORD_OR_MARK = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+|[^\w\s]")
# Texts that differ by more words are not nearly equal, however long they are; it bounds the time
# for long drafts.
MOST_EDITS = 200


def word_count(text: str) -> int:
    """How many words a text has.

    >>> word_count("The Arbel may run at 4.5 bar.")
    8
    """
    return sum(1 for _ in _WORD.finditer(text))


def near(first: str, second: str, least: float) -> bool:
    """Whether the similarity of two texts is at least ``least``, in (0, 1].

    It is the share of words and marks that both have in the same order: 2 * common / (words of
    both), with ``common`` the longest common subsequence, whatever the case. Texts with other
    numbers in them are never near: in a domain of facts, the number may be all the difference that
    matters.

    >>> near("The press is hot today, be careful.", "the press is hot today, be careful!", 0.8)
    True
    >>> near("The press runs at 4 bar.", "The press runs at 6 bar.", 0.8)
    False
    """
    left, right = _WORD_OR_MARK.findall(first.casefold()), _WORD_OR_MARK.findall(second.casefold())
    edits = min(int((1 - least) * (len(left) + len(right)) + 1e-9), MOST_EDITS)
    counts, others = Counter(left), Counter(right)
    different = (counts - others) + (others - counts)
    if different.total() > edits or any(word[0].isdigit() for word in different):
        return False
    return _within(left, right, edits)


def _within(left: Sequence[str], right: Sequence[str], most: int) -> bool:
    """Whether ``left`` becomes ``right`` by at most so many insertions and deletions.

    The greedy algorithm of Myers (1986), "An O(ND) difference algorithm and its variations",
    section 4: for each number of edits, the place that is furthest along each diagonal.
    """
    furthest = {1: 0}
    for edits in range(most + 1):
        for diagonal in range(-edits, edits + 1, 2):
            down = diagonal == -edits or (
                diagonal != edits and furthest[diagonal - 1] < furthest[diagonal + 1]
            )
            x = furthest[diagonal + 1] if down else furthest[diagonal - 1] + 1
            while (
                x < len(left) and 0 <= x - diagonal < len(right) and left[x] == right[x - diagonal]
            ):
                x += 1
            furthest[diagonal] = x
            if x >= len(left) and x - diagonal >= len(right):
                return True
    return False


def says(text: str, answer: str) -> bool:
    """Whether a text says an answer verbatim, as whole words, whatever the case and the spacing. A
    number is not found inside another one; an empty answer is said nowhere.

    >>> says("It may run at up to 25  BAR.", "25 bar"), says("It holds 125 or 2.5 litres.", "25"), says("1,250", "250")
    (True, False, False)
    """
    wanted = plain(answer)
    if not wanted:
        return False
    before = r"(?<!\w)" if wanted[0].isalnum() else ""
    after = r"(?!\w)" if wanted[-1].isalnum() else ""
    if wanted[0].isdigit():
        before += r"(?<!\d[.,:/])(?<!(?<!\w)[-\u2212])(?<!(?<!\w)[.,])"
    if wanted[-1].isdigit():
        after += r"(?![.,:/]\d)"
    return re.search(before + re.escape(wanted) + after, plain(text)) is not None


def plain(text: str) -> str:
    """The text as two are compared: NFKC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
