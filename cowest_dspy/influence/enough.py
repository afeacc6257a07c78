"""When an example needs no more drafts: there is a pair, or there will hardly be one."""

from __future__ import annotations

from collections.abc import Sequence

from cowest_dspy.influence.trace import Sampling, Trace

HOPELESS = 0.25
"""A smaller chance that a draft still to come differs in influence is not sampled for."""


def enough(made: Sequence[Trace], sampling: Sampling) -> bool:
    """Whether to sample no more drafts of an example after these.

    There is a pair when one draft that did not hurt is better than another text by the margin.
    There will hardly be one when all drafts so far had the same influence, and the chance of
    another one in what is left is below ``HOPELESS``.
    """
    left = sampling.drafts - len(made)
    scored = [trace for trace in made if trace.influence is not None]
    if any(_apart(better, worse, sampling.margin) for better in scored for worse in scored):
        return True
    if not scored:
        return left == 0
    same = len({trace.influence for trace in scored}) == 1
    return left == 0 or (same and chance_of_another(len(scored), left) < HOPELESS)


def chance_of_another(same: int, left: int) -> float:
    """The chance that one of ``left`` draws differs, after ``same`` draws that were all alike: 1 -
    (same + 1) / (same + left + 1).

    Laplace's rule of succession: with every rate of "alike" equally likely beforehand, the next
    draw is alike with probability (same + 1) / (same + 2), and the product over ``left`` draws
    telescopes (Laplace, Essai philosophique sur les probabilites, 1814; Jaynes, Probability Theory,
    2003, chapter 18).
    """
    return 1 - (same + 1) / (same + left + 1)


def _apart(better: Trace, worse: Trace, margin: float) -> bool:
    high, low = better.influence or 0.0, worse.influence or 0.0
    return (
        high >= 0
        and high - low >= margin
        and " ".join(better.completion.split()) != " ".join(worse.completion.split())
    )
