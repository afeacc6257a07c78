"""What a gate costs and scores on held-out examples: a curve over the trade, beside going always
one way, and at random.

Cost is that of the strong model, in dollars where all prices are known and not 0, otherwise in
tokens, as a share of always collaborating. A failure scores 0 here: an endpoint has to answer.
Where a draft failed, the gate asks the strong model alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval, wilson_interval
from cowest_dspy.optimizers.router.model import ROUTES, Gate
from cowest_dspy.optimizers.router.observing import Observed

STEPS = tuple(number / 40 for number in range(41))


@dataclass(frozen=True)
class Part:
    """One observed draft with the probabilities that heads gave it, and its weight."""

    observed: Observed
    of: Mapping[str, float]
    weight: float


@dataclass(frozen=True)
class Outcome:
    """The weighted mean score and cost of a way to route; ``cost`` as a share of always
    collaborating."""

    score: float
    cost: float


@dataclass(frozen=True)
class Point:
    """One way to route all examples: its mean score with a 95 % interval, its cost as a share of
    always collaborating, and how often each route was taken. ``trade`` is None where it has none.
    """

    name: str
    score: float
    interval: Interval
    cost: float
    routes: dict[str, int]
    trade: float | None = None


@dataclass(frozen=True)
class Curve:
    """The gate on ``n`` held-out examples. ``points``: the gate as it was fitted, always one way,
    at random in the gate's shares, and the cheapest right route that there was (no gate can do
    better). ``over``: the gate at other trades. ``against``: the gate's mean score less that of
    always collaborating, and of its random twin, with 95 % intervals over examples."""

    n: int
    unit: str
    points: tuple[Point, ...]
    over: tuple[Point, ...]
    against: dict[str, tuple[float, Interval | None]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def point(self, name: str) -> Point | None:
        """The point of that name."""
        return next((one for one in self.points if one.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def gate_curve(gate: Gate, observed: Sequence[Observed]) -> Curve:
    """What the gate costs and scores on these examples, which it must not have seen: one draft of
    each.

    Raises:
        ValueError: there is no example, or several drafts of one.
    """
    if not observed or len({one.example_id for one in observed}) < len(observed):
        raise ValueError("a curve is of one draft of each of some examples")
    unit, costs = _costs(observed)
    chosen = [_routed(gate, one, gate.trade) for one in observed]
    points = [_point("gate", observed, costs, chosen, gate.trade)]
    routes = ROUTES if "right" in gate.heads else ROUTES[1:]
    points += [
        _point(f"always {route}", observed, costs, [route] * len(observed)) for route in routes
    ]
    twin = _at_random(observed, costs, chosen)
    best = [_cheapest_right(one, cost, routes) for one, cost in zip(observed, costs, strict=True)]
    points += [twin, _point("best there was", observed, costs, best)]
    over = [
        _point("gate", observed, costs, [_routed(gate, one, step) for one in observed], step)
        for step in STEPS
    ]
    scores = [_score(one, route) for one, route in zip(observed, chosen, strict=True)]
    shares = {route: count / len(chosen) for route, count in Counter(chosen).items()}
    random = [
        math.fsum(share * _score(one, route) for route, share in shares.items()) for one in observed
    ]
    against = {
        "always collaborate": _difference(scores, [_score(one, "collaborate") for one in observed]),
        "always strong": _difference(scores, [_score(one, "strong") for one in observed]),
        twin.name: _difference(scores, random),
    }
    return Curve(len(observed), unit, tuple(points), tuple(over), against, dict(gate.about))


def outcome(parts: Sequence[Part], route: Callable[[Part], str]) -> Outcome:
    """The weighted mean score of routing so, and its cost, with the mean cost of each route where a
    draft's own is not known."""
    mean = costs_of([part.observed for part in parts])
    total = math.fsum(part.weight for part in parts)
    taken = [route(part) for part in parts]
    score = (
        math.fsum(
            part.weight * _score(part.observed, one) for part, one in zip(parts, taken, strict=True)
        )
        / total
    )
    return Outcome(
        score,
        math.fsum(part.weight * mean[one] for part, one in zip(parts, taken, strict=True)) / total,
    )


def costs_of(observed: Sequence[Observed]) -> dict[str, float]:
    """The mean cost of each route as a share of collaborating: of the strong model's tokens. Where
    no answer alone was counted, as in traces, it costs as much as a refined one."""
    alone = [(one.tokens.get("strong", 0), one.tokens.get("collaborate", 0)) for one in observed]
    known = [(strong, refined) for strong, refined in alone if strong and refined]
    share = (
        sum(strong for strong, _ in known) / sum(refined for _, refined in known) if known else 1.0
    )
    return {"weak": 0.0, "strong": share, "collaborate": 1.0}


def _costs(observed: Sequence[Observed]) -> tuple[str, list[dict[str, float]]]:
    priced = all(one.usd.get(route) is not None for one in observed for route in ROUTES)
    if priced and any(one.usd["collaborate"] for one in observed):
        return "USD", [{route: one.usd[route] or 0.0 for route in ROUTES} for one in observed]
    return "strong tokens", [
        {route: float(one.tokens.get(route, 0)) for route in ROUTES} for one in observed
    ]


def _routed(gate: Gate, one: Observed, trade: float) -> str:
    return gate.decide(one.features, one.draft, trade=trade).route if one.features else "strong"


def _cheapest_right(one: Observed, cost: Mapping[str, float], routes: Sequence[str]) -> str:
    """The cheapest of the routes that score best."""
    best = max(_score(one, route) for route in routes)
    return min(
        (route for route in routes if _score(one, route) == best), key=lambda route: cost[route]
    )


def _score(one: Observed, route: str) -> float:
    return one.scores.get(route) or 0.0


def _point(
    name: str,
    observed: Sequence[Observed],
    costs: Sequence[Mapping[str, float]],
    routes: Sequence[str],
    trade: float | None = None,
) -> Point:
    scores = [_score(one, route) for one, route in zip(observed, routes, strict=True)]
    whole = math.fsum(cost["collaborate"] for cost in costs) or 1.0
    spent = math.fsum(cost[route] for cost, route in zip(costs, routes, strict=True))
    counts: dict[str, int] = {route: sum(one == route for one in routes) for route in ROUTES}
    return Point(
        name, math.fsum(scores) / len(scores), _interval(scores), spent / whole, counts, trade
    )


def _at_random(
    observed: Sequence[Observed], costs: Sequence[Mapping[str, float]], chosen: Sequence[str]
) -> Point:
    """As many of each route as the gate takes, but of any examples: what it is expected to give."""
    shares = {route: count / len(chosen) for route, count in Counter(chosen).items()}
    means = [
        math.fsum(share * _score(one, route) for route, share in shares.items()) for one in observed
    ]
    whole = math.fsum(cost["collaborate"] for cost in costs) or 1.0
    spent = math.fsum(share * cost[route] for cost in costs for route, share in shares.items())
    interval = bootstrap_mean_interval([[value] for value in means]) or Interval(0.0, 1.0)
    return Point(
        "random, in the gate's shares",
        math.fsum(means) / len(means),
        interval,
        spent / whole,
        dict(Counter(chosen)),
    )


def _interval(scores: Sequence[float]) -> Interval:
    if all(score in (0.0, 1.0) for score in scores):
        return wilson_interval(int(sum(scores)), len(scores))
    return bootstrap_mean_interval([[score] for score in scores]) or Interval(0.0, 1.0)


def _difference(scores: Sequence[float], others: Sequence[float]) -> tuple[float, Interval | None]:
    gaps = [one - other for one, other in zip(scores, others, strict=True)]
    return math.fsum(gaps) / len(gaps), bootstrap_mean_interval([[gap] for gap in gaps])
