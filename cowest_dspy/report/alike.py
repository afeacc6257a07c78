"""Whether drafts depend on their inputs at all: arms whose drafts are nearly all one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cowest_dspy.pairs.filters import plain
from cowest_dspy.report.model import Arm

SHARE, LEAST = 0.75, 20  # of an arm's drafts that are one text; fewer drafts say nothing


def alike_drafts(arms: Iterable[Arm]) -> str | None:
    """A warning that names the arms of which at least three in four drafts (of 20 or more) are one
    text, up to case and spaces.

    Such a drafter has learned which answer is common. A small held-out split then takes or rolls
    back a tuned model by how often the one text is right in it, whatever the drafts are worth. The
    text itself is not quoted, since a page may hide it.
    """
    named: list[str] = []
    for arm in arms:
        drafts = Counter(plain(answer.draft) for answer in arm.answers if answer.draft is not None)
        most, n = max(drafts.values(), default=0), drafts.total()
        if n >= LEAST and most >= SHARE * n:
            named.append(f"{arm.title} ({most:,} of {n:,})")
    if not named:
        return None
    return (
        "Drafts hardly depend on their inputs; nearly all of an arm are one and the same text: "
        f"{'; '.join(named)}. A gain or loss "
        "of such an arm may be no more than how often that text is right in these examples."
    )
