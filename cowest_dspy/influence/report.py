"""The effect of a set of drafts: influences as counts, mean and harm rate with intervals, and the
noise to hold them against."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval, share_interval
from cowest_dspy.utils import notebook

Z = statistics.NormalDist().inv_cdf(0.975)
SAME = 1e-9  # scores nearer than this are equal: means of judges' scores carry rounding

_REMEDIES = {
    "refine truncated": "raise max_tokens of the strong model",
    "alone truncated": "raise max_tokens of the strong model",
    "truncated": "raise max_tokens of the weak model, or fine-tune it longer (num_train_epochs), "
    "until its drafts come to an end",
    "alone parse": "without a draft the strong model gives no answer that can be read, perhaps "
    "because it cannot know one: let the answer be a str, or say in the instructions what to "
    "answer then",
    "parse": "read one of these texts in the report's traces: the format asked for is not kept. "
    "Use another adapter, another draft format, or a worked example",
    "refusal": (
        "the provider or the model refuses these inputs: word the instructions otherwise, "
        "or use another model"
    ),
    "timeout": "raise timeout of that model, or lower its concurrency",
    "rate limit": "lower concurrency, or set requests_per_minute",
    "context": (
        "the prompt is too long for the model: shorten inputs or examples, or use a model "
        "with a longer context"
    ),
    "server": "the endpoint failed: see its log",
    "transport": "the endpoint could not be reached: see api_base and the network",
    "auth": "the endpoint refused the key: see api_key_env",
    "billing": "the account has no credit left",
}


def failure_kind(error: str) -> str:
    """The kind of an error ``"kind: text"``, with the step that failed where that is not the draft:
    refine, or alone.

    >>> failure_kind("timeout: 60 s"), failure_kind("alone parse: no answer")
    ('timeout', 'alone parse')
    """
    return error.partition(":")[0]


def format_kinds(kinds: Mapping[str, int]) -> str:
    """Counts of failures by kind, the most frequent first.

    >>> format_kinds({"parse": 2, "truncated": 13})
    'truncated 13, parse 2'
    """
    return ", ".join(
        f"{kind} {count:,}"
        for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    )


def remedy(kind: str) -> str:
    """Advice about failures of a kind, as a clause: ``remedy("alone timeout")`` is ``"raise
    timeout of that model, ..."``."""
    return next(
        (text for known, text in _REMEDIES.items() if kind.endswith(known)), "mend its cause"
    )


@dataclass(frozen=True)
class NoiseFloor:
    """Alone against alone: what the strong model's own sampling does to the score of one example,
    no draft in it.

    ``changed`` of ``n`` examples had different scores when the strong model answered again;
    ``mean_change`` in [0, 1] is the mean absolute difference of two such scores, and ``square``
    that of its square. All are 0 for a strong model that does not sample.
    """

    n: int
    changed: int
    mean_change: float
    square: Annotated[float, Field(ge=0)]

    @classmethod
    def of(cls, scores: Iterable[Sequence[float]]) -> NoiseFloor | None:
        """The floor in the scores of each example's answers alone, two or more of them; None when
        no example has as many."""
        answered = [group for group in scores if len(group) > 1]
        if not answered:
            return None
        apart = [[abs(a - b) for a, b in itertools.combinations(group, 2)] for group in answered]
        return cls(
            len(answered),
            sum(max(group) > 0 for group in apart),
            statistics.fmean(statistics.fmean(group) for group in apart),
            statistics.fmean(statistics.fmean(one * one for one in group) for group in apart),
        )

    @classmethod
    def from_traces(cls, traces: Iterable[Any]) -> NoiseFloor | None:
        """The floor of a collection that asked for several answers, from those it has; None where
        it asked for one each."""
        alone = {(trace.round, trace.example_id): trace.alone_scores for trace in traces}
        return cls.of(alone.values())

    def of_mean(self, examples: int, answers: int = 1) -> float:
        """The bound that a mean influence over so many examples, each of so many averaged answers,
        stays below in 97.5 % of cases when drafts do nothing: ``1.96 * sqrt(square / (examples *
        answers))``."""
        return Z * math.sqrt(self.square / (examples * answers)) if examples else float("nan")

    def __str__(self) -> str:
        return (
            f"noise floor {self.mean_change:.2f} (alone against alone: {self.changed} of "
            f"{self.n} changed)"
        )

    def _repr_html_(self) -> str:
        """The floor in a notebook."""
        return notebook.view(
            f"Noise floor {self.mean_change:.3f}",
            (
                "Asked again without any draft, the strong model scored otherwise on "
                f"{self.changed:,} of {self.n:,} examples."
            ),
            (
                f"Over {self.n:,} examples a mean influence may be {self.of_mean(self.n):.3f} by "
                "that "
                "alone."
            ),
        )


@dataclass(frozen=True, repr=False)
class InfluenceReport:
    """Influences of a set of drafts; None where one of the two answers failed.

    ``examples`` holds the id of each draft's example, since drafts of one example are not
    independent; empty when every draft is of an example of its own.

    ``floor`` is what the strong model's own sampling does to the score, where that was measured
    (:func:`noise_floor`).

    ``failures`` counts the drafts without an influence by the kind of failure: truncated, parse,
    timeout, ...

    ``print(report)`` writes ``influence +0.12 [+0.05, +0.19]  helped 31  hurt 9  same 155
    failed 5 (timeout 3, truncated 2)  n 200``.
    """

    values: tuple[float | None, ...]
    examples: tuple[str, ...] = ()
    floor: NoiseFloor | None = None
    failures: Mapping[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def from_traces(cls, traces: Iterable[Any]) -> InfluenceReport:
        """The influences of traces, which are read once; two values of each are kept."""
        values: list[float | None] = []
        examples: list[str] = []
        failures = Counter[str]()
        for trace in traces:
            if trace.error is not None:
                failures[failure_kind(trace.error)] += 1
            values.append(trace.influence)
            examples.append(trace.example_id)
        return cls(tuple(values), tuple(examples), failures=dict(failures))

    @property
    def scored(self) -> list[float]:
        """The influences that there are."""
        return [value for value in self.values if value is not None]

    @property
    def helped(self) -> int:
        """Drafts that made the answer better."""
        return sum(value > SAME for value in self.scored)

    @property
    def hurt(self) -> int:
        """Drafts that made the answer worse."""
        return sum(value < -SAME for value in self.scored)

    @property
    def same(self) -> int:
        """Drafts that changed no score."""
        return len(self.scored) - self.helped - self.hurt

    @property
    def failed(self) -> int:
        """Drafts without an influence, because a call failed."""
        return len(self.values) - len(self.scored)

    @property
    def counts(self) -> dict[str, int]:
        """Drafts by what they did: helped, same, hurt, failed."""
        return {name: getattr(self, name) for name in ("helped", "same", "hurt", "failed")}

    @property
    def mean(self) -> float:
        """Mean influence of the scored drafts, in [-1, 1]; nan when there are none."""
        return sum(self.scored) / len(self.scored) if self.scored else float("nan")

    @property
    def harm_rate(self) -> float:
        """The share of scored drafts that hurt, in [0, 1]; nan when there are none."""
        return self.hurt / len(self.scored) if self.scored else float("nan")

    def harm_interval(
        self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> Interval | None:
        """The interval of the harm rate, over examples as that of the mean; it has a width also
        where no draft hurt."""
        groups = [[value < -SAME for value in group] for group in self._by_example()]
        return share_interval(groups, level=level, seed=seed, repeats=resamples)

    @property
    def more_than_noise(self) -> bool | None:
        """Whether the whole interval of the mean lies above what the strong model's own sampling
        does to the mean score of so many examples; None while one of the two is not known."""
        interval = self.interval()
        return (
            None
            if interval is None or self.floor is None
            else interval.low > self.floor.of_mean(len(self._by_example()))
        )

    def interval(
        self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> Interval | None:
        """The bootstrap interval of the mean, drawing examples with all their drafts; None for
        fewer than two examples."""
        return bootstrap_mean_interval(
            self._by_example(), level=level, seed=seed, repeats=resamples
        )

    def _by_example(self) -> list[list[float]]:
        drafts: dict[str, list[float]] = {}
        for place, value in enumerate(self.values):
            if value is not None:
                drafts.setdefault(self.examples[place] if self.examples else str(place), []).append(
                    value
                )
        return list(drafts.values())

    def __str__(self) -> str:
        kind = max(self.failures, key=lambda kind: self.failures[kind], default=None)
        if not self.scored and kind:
            count = notebook.format_plural(len(self.values), "draft")
            return f"no influence: {count} failed ({format_kinds(self.failures)}): {remedy(kind)}"
        interval = self.interval()
        spread = f" [{interval.low:+.2f}, {interval.high:+.2f}]" if interval else ""
        kinds = f" ({format_kinds(self.failures)})" if self.failures else ""
        counts = (
            f"helped {self.helped}  hurt {self.hurt}  same {self.same}  failed "
            f"{self.failed}{kinds}  n {len(self.values)}"
        )
        floor = f"  {self.floor}" if self.floor else ""
        # What is left out may be the hard half.
        mend = f"\n{kind}: {remedy(kind)}" if kind and self.failed > len(self.scored) else ""
        return f"influence {self.mean:+.2f}{spread}  {counts}{floor}{mend}"

    def __repr__(self) -> str:
        return f"InfluenceReport({self})"

    def _repr_html_(self) -> str:
        """The report in a notebook: the mean with its interval, what the drafts did as a bar, the
        harm rate, the noise floor."""
        examples = notebook.format_plural(len(set(self.examples)), "example")
        harm = self.harm_interval()
        rate = f"harm rate {100 * self.harm_rate:.1f} %" if self.scored else None
        return notebook.view(
            f"Influence of {notebook.format_plural(len(self.values), 'draft')}"
            + (f" of {examples}" if self.examples else ""),
            f"mean {_spanned(self.mean, self.interval())}"
            if self.scored
            else "no draft has an influence yet",
            notebook.format_shares(self.counts),
            f"failed: {format_kinds(self.failures)}" if self.failures else None,
            f"{rate}, 95 % interval {100 * harm.low:.1f} to {100 * harm.high:.1f} %"
            if rate and harm
            else rate,
            self._against_noise(),
        )

    def _against_noise(self) -> str | None:
        if self.floor is None:
            return None
        words = {
            True: "the mean is more than noise",
            False: "the mean may be noise",
            None: "too little to tell it from the mean",
        }
        return f"{self.floor}: {words[self.more_than_noise]}"


def _spanned(value: float, interval: Interval | None) -> str:
    spread = f", 95 % interval {interval.low:+.3f} to {interval.high:+.3f}" if interval else ""
    return f"{value:+.3f}{spread}"
