"""fit_router: from what was observed to a Router. The only place that needs scikit-learn; what it gives
are plain numbers.

Each head is a logistic regression with an L2 penalty. Its strength is chosen by cross-validation
over examples (drafts of one example are never on both sides), its probabilities are calibrated by
Platt's method (Platt 1999) on predictions for examples that were left out, and so is the trade
between score and cost. Every example weighs the same, however many drafts it has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cowest_dspy.errors import RouterError
from cowest_dspy.optimizers.router.curve import Part, costs_of, outcome
from cowest_dspy.optimizers.router.features import category
from cowest_dspy.optimizers.router.model import Head, Router, sigmoid
from cowest_dspy.optimizers.router.observing import Observed

if TYPE_CHECKING:
    import numpy as np

LEAST = 20
"""Examples below which nothing is fitted."""
PENALTIES = (0.01, 0.1, 1.0, 10.0)
FOLDS = 5
CATEGORIES = 12
TRADES = tuple(number / 200 for number in range(201))


def fit_router(
    observed: Sequence[Observed],
    *,
    choose_on: Sequence[Observed] = (),
    within: float = 0.01,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
) -> Router:
    """The router that what was observed supports.

    Args:
        observed: of training examples, for instance the traces of a run (:func:`observed_in`).
        choose_on: examples on which the trade is chosen, for instance of the dev split
            (:func:`observe`); they are fitted on too, and judged by predictions that have not seen
            them. By default those of ``observed``.
        within: mean score, in [0, 1], that the router may lose against always collaborating there;
            the cheapest such trade is taken.
        samples: further drafts, as the features were made with.
        temperature: of these.
        seed: of the folds, and of further drafts.

    Raises:
        RouterError: fewer than 20 examples; or scikit-learn is missing.
    """
    rows = [one for one in (*observed, *choose_on) if one.whole]
    chosen = {id(one) for one in choose_on} or {id(one) for one in observed}
    groups = [one.example_id for one in rows]
    if len(set(groups)) < LEAST:
        raise RouterError(
            f"{len(set(groups))} examples with a draft and both answers: a router needs {LEAST} at "
            "least. Collect on more of them."
        )
    _check_installed()
    names = _features(rows)
    values, means, scales = _standardised(rows, names)
    weights = _weights(groups)
    fitted = {
        name: _head(values, targets, weights, groups, seed)
        for name, targets in _targets(rows).items()
    }
    effects = [abs(_influence(one)) for one in rows if _influence(one)]
    router = Router(
        features=names,
        means=means,
        scales=scales,
        heads={name: head for name, (head, _, _) in fitted.items()},
        effect=min(1.0, max(math.fsum(effects) / len(effects), 1e-6)) if effects else 1.0,
        costs=costs_of([*choose_on, *observed]),
        samples=samples,
        temperature=temperature,
        seed=seed,
    )
    parts = [
        Part(
            one,
            {name: float(unseen[place]) for name, (_, unseen, _) in fitted.items()},
            float(weights[place]),
        )
        for place, one in enumerate(rows)
        if id(one) in chosen
    ]
    trade, found = _trade(router, parts, within)
    about: dict[str, Any] = {
        "examples": len(set(groups)),
        "drafts": len(rows),
        "heads": {name: numbers for name, (_, _, numbers) in fitted.items()},
        "chosen_on": {
            "examples": len({part.observed.example_id for part in parts}),
            "within": within,
            **found,
        },
    }
    return router.model_copy(update={"trade": trade, "about": about})


def _check_installed() -> None:
    try:
        import sklearn  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise RouterError(
            'A router is fitted with scikit-learn: pip install "cowest_dspy[router]". Using one needs '
            "nothing more."
        ) from None


def _features(rows: Sequence[Observed]) -> tuple[str, ...]:
    """The features that all rows have, and the drafts that are frequent enough to be a feature
    each."""
    shared = set(rows[0].features)
    for one in rows:
        shared &= set(one.features)
    counts = Counter(category(one.draft) for one in rows)
    frequent = [
        text
        for text, count in counts.most_common(CATEGORIES)
        if text and count >= max(5, 0.02 * len(rows))
    ]
    ordered = [name for name in rows[0].features if name in shared]
    return (*ordered, *(f"is: {text}" for text in frequent))


def _standardised(
    rows: Sequence[Observed], names: Sequence[str]
) -> tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]:
    import numpy as np

    raw = np.array([[_value(one, name) for name in names] for one in rows], dtype=float)
    means, scales = raw.mean(axis=0), raw.std(axis=0)
    scales[scales < 1e-9] = 1.0
    return (raw - means) / scales, tuple(map(float, means)), tuple(map(float, scales))


def _value(one: Observed, name: str) -> float:
    return float(category(one.draft) == name[4:]) if name.startswith("is: ") else one.features[name]


def _weights(groups: Sequence[str]) -> np.ndarray:
    import numpy as np

    counts = Counter(groups)
    return np.array([1.0 / counts[group] for group in groups])


def _influence(one: Observed) -> float:
    refined, alone = one.scores["collaborate"], one.scores["strong"]
    return refined - alone if refined is not None and alone is not None else 0.0


def _targets(rows: Sequence[Observed]) -> dict[str, np.ndarray]:
    """What each head is to say of each row, in [0, 1]."""
    import numpy as np

    made: dict[str, Callable[[Observed], float]] = {
        "helped": lambda one: float(_influence(one) > 0),
        "hurt": lambda one: float(_influence(one) < 0),
        "refined": lambda one: one.scores["collaborate"] or 0.0,
    }
    if all(one.scores["weak"] is not None for one in rows):
        made["right"] = lambda one: one.scores["weak"] or 0.0
    return {name: np.array([target(one) for one in rows]) for name, target in made.items()}


def _head(
    values: np.ndarray, targets: np.ndarray, weights: np.ndarray, groups: Sequence[str], seed: int
) -> tuple[Head, np.ndarray, dict[str, float]]:
    """A head, its probabilities for rows whose examples were left out, and how good they are."""
    import numpy as np

    rate = float(np.average(targets, weights=weights))
    flat = Head(
        weights=(0.0,) * values.shape[1],
        intercept=_logit((rate * weights.sum() + 0.5) / (weights.sum() + 1)),
    )
    if float(np.ptp(targets)) == 0.0:
        return (
            flat,
            np.full(len(targets), flat.probability((0.0,) * values.shape[1])),
            {"rate": rate},
        )
    folds = _folds(groups, seed)
    linear = {penalty: _left_out(values, targets, weights, folds, penalty) for penalty in PENALTIES}
    best = min(PENALTIES, key=lambda one: _log_loss(_probabilities(linear[one]), targets, weights))
    slope, shift = _platt(linear[best], targets, weights)
    # Calibrated in turn by the other folds, so that what is reported and chosen on has not seen its
    # own example.
    unseen = np.empty(len(targets))
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(targets)), fold)
        one, other = _platt(linear[best][rest], targets[rest], weights[rest])
        unseen[fold] = _probabilities(one * linear[best][fold] + other)
    model = _fitted(values, targets, weights, best)
    head = Head(
        weights=tuple(map(float, model.coef_[0])),
        intercept=float(model.intercept_[0]),
        slope=slope,
        shift=shift,
    )
    base = np.full(len(targets), rate)
    found = {
        "rate": rate,
        "log_loss": _log_loss(unseen, targets, weights),
        "log_loss_of_rate": _log_loss(base, targets, weights),
        "brier": float(np.average((unseen - targets) ** 2, weights=weights)),
        "brier_of_rate": float(np.average((base - targets) ** 2, weights=weights)),
        "calibration_error": _calibration_error(unseen, targets, weights),
        "penalty": best,
    }
    return head, unseen, found


def _folds(groups: Sequence[str], seed: int) -> list[np.ndarray]:
    import numpy as np

    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    number = {names[name]: place % FOLDS for place, name in enumerate(order)}
    return [
        np.array([row for row, group in enumerate(groups) if number[group] == fold], dtype=int)
        for fold in range(FOLDS)
    ]


def _left_out(
    values: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    folds: Sequence[np.ndarray],
    penalty: float,
) -> np.ndarray:
    import numpy as np

    linear = np.empty(len(targets))
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(targets)), fold)
        if float(np.ptp(targets[rest])) == 0.0:
            linear[fold] = _logit(min(0.98, max(0.02, float(targets[rest].mean()))))
        else:
            model = _fitted(values[rest], targets[rest], weights[rest], penalty)
            linear[fold] = values[fold] @ model.coef_[0] + model.intercept_[0]
    return linear


def _fitted(values: np.ndarray, targets: np.ndarray, weights: np.ndarray, penalty: float) -> Any:
    """A logistic regression of targets in [0, 1]: each row stands for its share of ones and its
    share of zeros."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    both, labels = np.vstack([values, values]), np.repeat([1, 0], len(targets))
    share = np.concatenate([weights * targets, weights * (1 - targets)])
    kept = share > 0
    return LogisticRegression(C=penalty, max_iter=2000).fit(
        both[kept], labels[kept], sample_weight=share[kept]
    )


def _platt(linear: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Slope and shift of the calibration; a slope below 0 would turn the ranking round, and then
    the mean is all that is known."""
    import numpy as np

    if float(np.ptp(targets)) == 0.0 or float(np.ptp(linear)) < 1e-9:
        return 1.0, 0.0
    model = _fitted(linear[:, None], targets, weights, 1.0)
    slope, shift = float(model.coef_[0][0]), float(model.intercept_[0])
    return (
        (slope, shift)
        if slope > 0
        else (0.0, _logit(min(0.98, max(0.02, float(np.average(targets, weights=weights))))))
    )


def _probabilities(linear: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.array([sigmoid(float(value)) for value in linear])


def _log_loss(found: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    import numpy as np

    safe = np.clip(found, 1e-6, 1 - 1e-6)
    return float(
        np.average(-(targets * np.log(safe) + (1 - targets) * np.log(1 - safe)), weights=weights)
    )


def _calibration_error(found: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """The mean distance of predicted and observed shares over ten bins of predictions (Naeini et
    al. 2015)."""
    import numpy as np

    bins = np.minimum((found * 10).astype(int), 9)
    total = 0.0
    for number in range(10):
        inside = bins == number
        if inside.any():
            gap = np.average(found[inside], weights=weights[inside]) - np.average(
                targets[inside], weights=weights[inside]
            )
            total += float(abs(gap) * weights[inside].sum())
    return total / float(weights.sum())


def _trade(router: Router, parts: Sequence[Part], within: float) -> tuple[float, dict[str, float]]:
    """The trade that costs least among those that lose no more than ``within``; and what it gave
    there."""
    always = outcome(parts, lambda part: "collaborate")
    best, price = None, 0.0
    for trade in TRADES:
        made = outcome(parts, lambda part, trade=trade: _route(router, part.of, trade))
        if made.score >= always.score - within - 1e-12 and (
            best is None or made.cost < best.cost - 1e-12
        ):
            best, price = made, trade
    if (
        best is None
    ):  # Even the best routes lose: what is predicted is not good enough to leave the collaboration.
        best = outcome(parts, lambda part: _route(router, part.of, 0.0))
    return price, {"score": best.score, "cost": best.cost, "score_collaborate": always.score}


def _route(router: Router, of: Mapping[str, float], trade: float) -> str:
    return router.weighed(of, trade=trade).route


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))
