"""The router: where a draft pays. Weak only, strong only, or both, decided from the input and the
draft.

features.py    what is seen of an input and its draft, as numbers
model.py       Router: a few logistic functions as plain numbers, their decision, and its file
likelihood.py  how likely the weak model finds its own draft
observing.py   what each way of answering scored and cost, of traces and of examples
fitting.py     fit_router: from what was observed to a Router (scikit-learn, only here)
curve.py       what the router costs and scores on held-out examples, beside going always one way
routed.py       Routed: a program behind a router
showing.py     tables, chart and page of a curve

    router = fit_router(observed_in(traces))
    program = Routed(collaboration, router)
    program(question="...").route          # "weak", "strong" or "collaborate"
"""

from cowest_dspy.optimizers.router.curve import Curve, Point, router_curve
from cowest_dspy.optimizers.router.features import draft_features
from cowest_dspy.optimizers.router.fitting import fit_router
from cowest_dspy.optimizers.router.likelihood import DraftLikelihood
from cowest_dspy.optimizers.router.model import (
    OLD_FILE,
    ROUTER_FILE,
    ROUTES,
    Decision,
    Head,
    Route,
    Router,
)
from cowest_dspy.optimizers.router.observing import Observed, observe, observed_in
from cowest_dspy.optimizers.router.routed import Routed

__all__ = [
    "OLD_FILE",
    "ROUTER_FILE",
    "ROUTES",
    "Curve",
    "Decision",
    "DraftLikelihood",
    "Head",
    "Observed",
    "Point",
    "Route",
    "Routed",
    "Router",
    "draft_features",
    "fit_router",
    "observe",
    "observed_in",
    "router_curve",
]
