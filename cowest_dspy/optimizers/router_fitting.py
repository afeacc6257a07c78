"""Fit a router on what each route scored and cost.

Each head is scikit-learn's logistic regression with calibrated probabilities (Platt 1999). All that
is reported of a fit, and the trade between score and cost, comes from predictions for examples that
were left out of it; drafts of one example are never on both sides. Every example weighs the same,
however many drafts it has.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dspy

from cowest_dspy.errors import RouterError
from cowest_dspy.influence.metric import Attempt, Metric, attempt, attempt_score
from cowest_dspy.influence.trace import Trace
from cowest_dspy.optimizers.router import (
    ROUTES,
    DraftLikelihood,
    Head,
    Route,
    Router,
    SamplingFailed,
    draft_features,
    draft_label,
    drafter_features,
    feature_value,
    sample_drafts,
)
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.pool import OnProgress, map_in_threads
from cowest_dspy.store.store import Store
from cowest_dspy.store.usage import total_usd
from cowest_dspy.utils.extras import check_extra

if TYPE_CHECKING:
    import numpy as np

MIN_EXAMPLES = 20
"""Examples below which nothing is fitted."""
FOLDS = 5
MAX_LABELS = 12
"""Frequent drafts that become a feature each."""
TRADES = tuple(number / 200 for number in range(201))


@dataclass(frozen=True)
class Observed:
    """One draft of one example, with what each route scored and cost.

    ``features`` are empty where there is no draft. ``scores`` are in [0, 1]: of the draft as an
    answer ("weak"; None where it holds none), of the strong model alone, and of the refined answer;
    None where it failed. ``tokens`` of a route are those of the strong model, read and written;
    ``usd`` what it cost, None where a price is not known. Of traces, "strong" has neither: traces
    do not keep them.
    """

    example_id: str
    draft: str
    features: Mapping[str, float]
    scores: Mapping[Route, float | None]
    tokens: Mapping[Route, int] = field(default_factory=dict)
    usd: Mapping[Route, float | None] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether a router can learn from it: a draft, and scores of both answers of the strong
        model."""
        scores = (self.scores["strong"], self.scores["collaborate"])
        return bool(self.features) and None not in scores

    def score(self, route: Route) -> float:
        """The score of a route; a failure counts as 0, since an endpoint has to answer."""
        return self.scores.get(route) or 0.0


def observe_traces(
    traces: Iterable[Trace],
    *,
    samples: int = 0,
    likelihood: DraftLikelihood | None = None,
    program: Collaboration | None = None,
) -> list[Observed]:
    """Convert traces, in their order; those without an influence are left out.

    Args:
        samples: so many of an example's other drafts are used for "agreement" and "likeness";
            examples with fewer are left out.
        likelihood: of the weak model whose drafts the router will see.
        program: whose drafter may describe drafts (:func:`drafter_features`).
    """
    groups: dict[tuple[int, str], list[Trace]] = defaultdict(list)
    for trace in traces:
        groups[trace.round, trace.example_id].append(trace)
    usable: list[tuple[Trace, list[str]]] = []
    for group in groups.values():
        for trace in group:
            others = [one.draft for one in group if one.draft_index != trace.draft_index][:samples]
            if trace.draft and trace.influence is not None and len(others) == samples:
                usable.append((trace, others))
    logprobs: Sequence[float | None] = [None] * len(usable)
    if likelihood is not None:
        logprobs = likelihood.of_all([(trace.inputs, trace.draft) for trace, _ in usable])
    return [
        Observed(
            trace.example_id,
            trace.draft,
            draft_features(trace.inputs, trace.draft, others=others, logprob=logprob)
            | drafter_features(program, trace.draft),
            {
                "weak": trace.draft_score,
                "strong": trace.alone_score,
                "collaborate": trace.refined_score,
            },
            {
                "weak": 0,
                "collaborate": trace.tokens.get("strong_in", 0) + trace.tokens.get("strong_out", 0),
            },
        )
        for (trace, others), logprob in zip(usable, logprobs, strict=True)
    ]


def observe(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    metric: Metric,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    likelihood: DraftLikelihood | None = None,
    store: Store | None = None,
    threads: int = 8,
    on_progress: OnProgress | None = None,
) -> list[Observed]:
    """Answer every example by all three routes, in order: N examples cost 2 N strong answers, less
    what the store knows.

    The draft is the program's own; ``samples``, ``temperature`` and ``seed`` are of further drafts.
    """

    def sample(inputs: Mapping[str, Any]) -> list[str]:
        return sample_drafts(program, inputs, samples, temperature=temperature, seed=seed)

    def one(example: dspy.Example) -> Observed:
        inputs = dict(example.inputs().items())
        drafted = attempt(lambda: program.ask_draft(**inputs))
        alone = attempt(lambda: program.ask_alone(**inputs))
        outputs = drafted.outputs or {}
        draft = str(outputs.get("draft", ""))
        features: dict[str, float] = {}
        refined: Attempt | None = None
        if drafted.outputs is not None:
            refined = attempt(lambda: program.ask_refine(draft, **inputs))
            with suppress(SamplingFailed):
                logprob = likelihood(inputs, draft) if likelihood else None
                features = draft_features(inputs, draft, others=sample(inputs), logprob=logprob)
                features |= drafter_features(program, draft)
        holds = program.holds_answer(outputs)
        return Observed(
            example.id,
            draft,
            features,
            {
                "weak": attempt_score(metric, example, outputs).score if holds else None,
                "strong": _score(metric, example, alone),
                "collaborate": _score(metric, example, refined),
            },
            {"weak": 0, "strong": _tokens(alone), "collaborate": _tokens(refined)},
            {"weak": 0.0, "strong": _usd(alone), "collaborate": _usd(refined)},
        )

    with keeping(store):
        return map_in_threads(one, examples, num_threads=threads, on_progress=on_progress)


def _score(metric: Metric, example: dspy.Example, made: Attempt | None) -> float | None:
    if made is None or made.outputs is None:
        return None
    fields = {name: value for name, value in made.outputs.items() if name != "draft"}
    return attempt_score(metric, example, fields).score


def _tokens(made: Attempt | None) -> int:
    return sum(call.input_tokens + call.output_tokens for call in made.calls) if made else 0


def _usd(made: Attempt | None) -> float | None:
    return total_usd(call.usd for call in made.calls) if made else 0.0


# Fitting


def fit_router(
    observed: Sequence[Observed],
    *,
    choose_on: Sequence[Observed] = (),
    within: float = 0.01,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
) -> Router:
    """Fit a router.

    Args:
        observed: of training examples, for instance the traces of a run (:func:`observe_traces`).
        choose_on: examples on which the trade is chosen, for instance of the dev split
            (:func:`observe`); by default those of ``observed``. They are fitted on too, and judged
            by predictions that have not seen them.
        within: mean score, in [0, 1], that routing may lose against always collaborating there; the
            cheapest such trade is taken. Where none is cheaper or better, the router does not pay
            and refines every draft.
        samples: further drafts that the features were made with.
        temperature: that of these drafts.
        seed: that of these drafts, and of the fit.

    Raises:
        RouterError: fewer than 20 examples; or scikit-learn is missing.
    """
    check_extra("route", "Fitting a router", RouterError)
    import numpy as np

    rows = [one for one in (*observed, *choose_on) if one.complete]
    groups = [one.example_id for one in rows]
    counts = Counter(groups)
    _check_possible(len(counts))
    from sklearn.preprocessing import StandardScaler

    names = _feature_names(rows)
    raw = np.array(
        [[feature_value(name, one.features, one.draft) for name in names] for one in rows]
    )
    weights = np.array([1.0 / counts[one] for one in groups])
    scaler = StandardScaler().fit(raw)
    data = _Rows(np.asarray(scaler.transform(raw)), weights, groups)
    fits = _fit_heads(data, rows)
    router = Router(
        features=names,
        heads={route: _unscaled(fit.head, scaler) for route, fit in fits.items()},
        costs=_mean_costs([*choose_on, *observed]),
        samples=samples,
        temperature=temperature,
        seed=seed,
    )
    judged_ids = {id(one) for one in choose_on or observed}
    judged = [place for place, one in enumerate(rows) if id(one) in judged_ids]
    unseen: list[Mapping[Route, float]] = [
        {route: float(fit.unseen[place]) for route, fit in fits.items()} for place in judged
    ]
    trade, pays, outcome = _choose_trade(
        router, [rows[place] for place in judged], unseen, weights[judged], within
    )
    about = {
        "examples": len(counts),
        "drafts": len(rows),
        "heads": {route: fit.quality for route, fit in fits.items()},
        "chosen_on": {"examples": len({groups[k] for k in judged}), "within": within, **outcome},
    }
    return router.model_copy(update={"trade": trade, "pays": pays, "about": about})


def _check_possible(examples: int) -> None:
    if examples < MIN_EXAMPLES:
        raise RouterError(
            f"{examples} examples with a draft and both answers: a router needs {MIN_EXAMPLES} at "
            "least. Collect on more of them."
        )


def _feature_names(rows: Sequence[Observed]) -> tuple[str, ...]:
    """The features that all rows have, and "is: TEXT" for drafts that are frequent."""
    shared = set.intersection(*(set(one.features) for one in rows))
    counts = Counter(draft_label(one.draft) for one in rows)
    frequent = [
        f"is: {text}"
        for text, count in counts.most_common(MAX_LABELS)
        if text and count >= max(5, 0.02 * len(rows))
    ]
    return (*(name for name in rows[0].features if name in shared), *frequent)


@dataclass(frozen=True)
class _Rows:
    """Standardised features, the weight of each row, and the example that it belongs to."""

    values: np.ndarray
    weights: np.ndarray
    groups: Sequence[str]


@dataclass(frozen=True)
class _Fit:
    """A head, its predictions for rows whose examples were left out, and how good these are."""

    head: Head
    unseen: np.ndarray
    quality: dict[str, float]


def _fit_heads(data: _Rows, rows: Sequence[Observed]) -> dict[Route, _Fit]:
    """A head of each route; of "weak" where all drafts hold answers."""
    import numpy as np

    routes = ROUTES if all(one.scores["weak"] is not None for one in rows) else ROUTES[1:]
    return {
        route: _fit_head(data, np.array([one.score(route) for one in rows])) for route in routes
    }


def _fit_head(data: _Rows, targets: np.ndarray) -> _Fit:
    """Fit a head to scores in [0, 1]; one that predicts examples which were left out no better than
    the mean score does is the mean score."""
    import numpy as np
    from sklearn.metrics import mean_squared_error
    from sklearn.model_selection import GroupKFold

    rate = float(np.average(targets, weights=data.weights))
    base = np.full(len(targets), min(0.999, max(0.001, rate)))
    model, unseen = _calibrated(data, targets, np.arange(len(targets))), base.copy()
    for rest, left in GroupKFold(FOLDS).split(data.values, groups=data.groups):
        part = _calibrated(data, targets, rest)
        if part is not None:
            unseen[left] = part.predict_proba(data.values[left])[:, 1]
    brier, brier_of_rate = (
        float(mean_squared_error(targets, found, sample_weight=data.weights))
        for found in (unseen, base)
    )
    size = data.values.shape[1]
    if model is None or brier >= brier_of_rate:
        head = Head(weights=(0.0,) * size, intercept=math.log(base[0] / (1 - base[0])))
        return _Fit(head, base, {"rate": rate, "brier_of_rate": brier_of_rate})
    # The calibrated function is logistic in the features: its values at the origin and at the unit
    # vectors give its coefficients.
    share = model.predict_proba(np.vstack([np.zeros(size), np.eye(size)]))[:, 1]
    logits = np.log(share / (1 - share))
    head = Head(weights=tuple(map(float, logits[1:] - logits[0])), intercept=float(logits[0]))
    quality = {
        "rate": rate,
        "brier": brier,
        "brier_of_rate": brier_of_rate,
        "calibration_error": _calibration_error(unseen, targets, data.weights),
    }
    return _Fit(head, unseen, quality)


def _unscaled(head: Head, scaler: Any) -> Head:
    """A head of standardised features as one of the features themselves."""
    weights = [weight / float(one) for weight, one in zip(head.weights, scaler.scale_, strict=True)]
    shift = math.fsum(
        weight * float(mean) for weight, mean in zip(weights, scaler.mean_, strict=True)
    )
    return Head(weights=tuple(weights), intercept=head.intercept - shift)


def _calibrated(data: _Rows, targets: np.ndarray, rows: np.ndarray) -> Any:
    """scikit-learn's calibrated classifier on these rows; None where a fold lacks one of both
    classes. A row of a score between 0 and 1 stands for its share of ones and its share of
    zeros."""
    import numpy as np
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    part, weights = targets[rows], data.weights[rows]
    share = np.concatenate([weights * part, weights * (1 - part)])
    used = share > 0
    both = np.concatenate([rows, rows])[used]
    values, labels = data.values[both], np.repeat([1, 0], len(rows))[used]
    groups = [data.groups[row] for row in both]
    folds = list(GroupKFold(FOLDS).split(values, groups=groups))
    if any(len(set(labels[rest])) < 2 for rest, _ in folds):
        return None
    model = CalibratedClassifierCV(
        LogisticRegression(max_iter=2000),
        method="sigmoid",
        cv=folds,
        ensemble=False,  # pyright: ignore[reportArgumentType]
    )
    return model.fit(values, labels, sample_weight=share[used])


def _calibration_error(predicted: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """The mean distance of predicted and observed scores over ten bins of predictions (Naeini et
    al. 2015)."""
    import numpy as np

    bins = np.minimum((predicted * 10).astype(int), 9)
    gaps = np.bincount(bins, weights * (predicted - targets), 10)
    return float(np.abs(gaps).sum() / weights.sum())


def _choose_trade(
    router: Router,
    rows: Sequence[Observed],
    predicted: Sequence[Mapping[Route, float]],
    weights: np.ndarray,
    within: float,
) -> tuple[float, bool, dict[str, float]]:
    """The trade that costs least among those that lose no more than ``within``, whether it pays,
    and what it gave."""
    import numpy as np

    def outcome(routes: Sequence[Route]) -> tuple[float, float]:
        scores = [one.score(route) for one, route in zip(rows, routes, strict=True)]
        costs = [router.costs[route] for route in routes]
        return float(np.average(scores, weights=weights)), float(np.average(costs, weights=weights))

    always_together: list[Route] = ["collaborate"] * len(rows)
    always = outcome(always_together)
    good = [(always[1], -always[0], 0.0)]
    for trade in TRADES:
        score, cost = outcome([router.choose(one, trade) for one in predicted])
        better = cost < always[1] - 1e-12 or score > always[0] + 1e-12
        if better and score >= always[0] - within - 1e-12:
            good.append((cost, -score, trade))
    cost, loss, trade = min(good)
    found = {"score": -loss, "cost": cost, "score_collaborate": always[0]}
    return trade, len(good) > 1, found


def _mean_costs(observed: Sequence[Observed]) -> dict[Route, float]:
    """The mean cost of each route in the strong model's tokens, as a share of collaborating. Where
    no answer alone was counted, as in traces, it costs as much as a refined one."""
    counts = [(one.tokens.get("strong", 0), one.tokens.get("collaborate", 0)) for one in observed]
    known = [(alone, refined) for alone, refined in counts if alone and refined]
    share = sum(alone for alone, _ in known) / sum(refined for _, refined in known) if known else 1
    return {"weak": 0.0, "strong": float(share), "collaborate": 1.0}
