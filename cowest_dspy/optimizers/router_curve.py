"""Measure what a router costs and scores on held-out examples, at every trade between both; beside
going always one way, at random, and the best that was possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval, wilson_interval
from cowest_dspy.optimizers.router import ROUTES, Router
from cowest_dspy.optimizers.router_fitting import Observed

if TYPE_CHECKING:
    import numpy as np

CURVE_TRADES = tuple(number / 40 for number in range(41))
TWIN = "random, in the router's shares"


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
    """A router on ``n`` held-out examples. ``points``: the router as it was fitted, always one way,
    at random in the router's shares, and the cheapest right route that there was (no router can do
    better). ``over``: the router at other trades. ``against``: the router's mean score less that of
    always collaborating, always the strong model, and its random twin, with 95 % intervals over
    examples. ``unit`` of costs: "USD" or "strong tokens"."""

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
        """Convert to plain JSON values."""
        return asdict(self)


def router_curve(router: Router, observed: Sequence[Observed]) -> Curve:
    """Measure what the router costs and scores on examples that it has not seen, one draft of each.

    Cost is that of the strong model, in dollars where all prices are known and not 0, otherwise in
    tokens. A failure scores 0; where a draft failed, the router asks the strong model alone.

    Raises:
        ValueError: there is no example, or several drafts of one.
    """
    import numpy as np

    if not observed or len({one.example_id for one in observed}) < len(observed):
        raise ValueError("a curve is of one draft of each of some examples")
    unit, costs = _costs(observed)
    scores = np.array([[one.score(route) for route in ROUTES] for one in observed])
    predicted = [
        router.predict(one.features, one.draft) if one.features else None for one in observed
    ]
    one_hot = np.eye(len(ROUTES))

    def routed(trade: float | None) -> np.ndarray:
        routes = ["strong" if one is None else router.choose(one, trade) for one in predicted]
        return one_hot[[ROUTES.index(route) for route in routes]]

    def point(name: str, shares: np.ndarray, trade: float | None = None) -> Point:
        found, whole = (scores * shares).sum(1), float(costs[:, 2].sum()) or 1.0
        counts = {
            route: round(float(count)) for route, count in zip(ROUTES, shares.sum(0), strict=True)
        }
        cost = float((costs * shares).sum()) / whole
        return Point(name, math.fsum(found) / len(found), _interval(found), cost, counts, trade)

    taken, count = routed(None), len(observed)
    possible = [place for place, route in enumerate(ROUTES) if route in router.heads]
    ways = {f"always {ROUTES[k]}": np.tile(one_hot[k], (count, 1)) for k in possible}
    ways[TWIN] = np.tile(taken.mean(0), (count, 1))
    best = [min(possible, key=lambda k: (-scores[n, k], costs[n, k])) for n in range(count)]
    compared = ("always collaborate", "always strong", TWIN)
    gaps = {name: (scores * (taken - ways[name])).sum(1) for name in compared}
    return Curve(
        count,
        unit,
        (
            point("router", taken, router.trade),
            *(point(name, shares) for name, shares in ways.items()),
            point("best there was", one_hot[best]),
        ),
        tuple(point("router", routed(trade), trade) for trade in CURVE_TRADES),
        {
            name: (
                math.fsum(gap) / len(gap),
                bootstrap_mean_interval([[float(one)] for one in gap]),
            )
            for name, gap in gaps.items()
        },
        dict(router.about),
    )


def _costs(observed: Sequence[Observed]) -> tuple[str, np.ndarray]:
    import numpy as np

    usd = [[one.usd.get(route) for route in ROUTES] for one in observed]
    if all(None not in row for row in usd) and any(row[-1] for row in usd):
        return "USD", np.array(usd, dtype=float)
    return "strong tokens", np.array(
        [[float(one.tokens.get(route, 0)) for route in ROUTES] for one in observed]
    )


def _interval(scores: np.ndarray) -> Interval:
    values = [float(score) for score in scores]
    if all(value in (0.0, 1.0) for value in values):
        return wilson_interval(int(sum(values)), len(values))
    return bootstrap_mean_interval([[value] for value in values]) or Interval(0.0, 1.0)
