"""Length bias: whether the chosen drafts are longer than the rejected ones, which preference tuning
would learn first.

See Park et al. (2024), "Disentangling Length from Quality in Direct Preference Optimization", arXiv
2403.19159.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cowest_dspy.influence.intervals import Interval, bootstrap_mean_interval
from cowest_dspy.pairs.pair import Pair
from cowest_dspy.pairs.texts import word_count

# A mean difference that is certain, but smaller than this part of the mean length, is not warned
# of.
STRONG = 0.2


@dataclass(frozen=True)
class Lengths:
    """Words of chosen and rejected drafts, over all pairs.

    ``difference`` is the mean of chosen less rejected, ``interval`` its 95 % bootstrap interval
    over examples (None for fewer than two); ``longer`` and ``shorter`` are the shares of pairs, in
    [0, 1], whose chosen draft is longer or shorter.
    """

    chosen: float
    rejected: float
    difference: float
    interval: Interval | None
    longer: float
    shorter: float

    @property
    def biased(self) -> bool:
        """Whether the difference is certain (0 is outside the interval) and more than a fifth of
        the mean length."""
        certain = self.interval is not None and not self.interval.low <= 0 <= self.interval.high
        return certain and abs(self.difference) > STRONG * (self.chosen + self.rejected) / 2

    @property
    def warning(self) -> str | None:
        """What to say, and to try, when there is a bias."""
        if not self.biased:
            return None
        word = "longer" if self.difference > 0 else "shorter"
        return (
            f"Chosen drafts are {word} than rejected ones by {abs(self.difference):.1f} words: "
            "tuning may teach length instead of "
            "content. [pairs] length_ratio = 1.5 keeps pairs of similar length only."
        )

    def __str__(self) -> str:
        spread = f" [{self.interval.low:+.1f}, {self.interval.high:+.1f}]" if self.interval else ""
        return (
            f"chosen {self.chosen:.1f} words, rejected {self.rejected:.1f}, difference "
            f"{self.difference:+.1f}{spread}; chosen is "
            f"longer in {100 * self.longer:.0f} % and shorter in {100 * self.shorter:.0f} % of "
            "the pairs"
        )


def lengths_of(pairs: Sequence[Pair]) -> Lengths | None:
    """The lengths of pairs; None when there are none. The same pairs give the same interval."""
    if not pairs:
        return None
    chosen = [_words(pair.chosen) for pair in pairs]
    rejected = [_words(pair.rejected) for pair in pairs]
    differences = [one - other for one, other in zip(chosen, rejected, strict=True)]
    groups: dict[tuple[int, str], list[float]] = {}
    for pair, difference in zip(pairs, differences, strict=True):
        groups.setdefault((pair.round, pair.example_id), []).append(difference)
    count = len(pairs)
    return Lengths(
        chosen=sum(chosen) / count,
        rejected=sum(rejected) / count,
        difference=sum(differences) / count,
        interval=bootstrap_mean_interval(list(groups.values())),
        longer=sum(difference > 0 for difference in differences) / count,
        shorter=sum(difference < 0 for difference in differences) / count,
    )


def _words(messages: Sequence[dict[str, str]]) -> int:
    return sum(word_count(message["content"]) for message in messages)
