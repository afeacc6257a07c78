"""The gate: where a draft pays. Weak only, strong only, or both, decided from the input and the
draft.

features.py    what is seen of an input and its draft, as numbers
model.py       Gate: a few logistic functions as plain numbers, their decision, and its file
likelihood.py  how likely the weak model finds its own draft
observing.py   what each way of answering scored and cost, of traces and of examples
fitting.py     fit_gate: from what was observed to a Gate (scikit-learn, only here)
curve.py       what the gate costs and scores on held-out examples, beside going always one way
gated.py       Gated: a program behind a gate
showing.py     tables, chart and page of a curve

    gate = fit_gate(observed_in(traces))
    program = Gated(collaboration, gate)
    program(question="...").route          # "weak", "strong" or "collaborate"
"""

from cowest_dspy.optimizers.router.curve import Curve, Point, gate_curve
from cowest_dspy.optimizers.router.features import draft_features
from cowest_dspy.optimizers.router.fitting import fit_gate
from cowest_dspy.optimizers.router.gated import Gated
from cowest_dspy.optimizers.router.likelihood import DraftLikelihood
from cowest_dspy.optimizers.router.model import ROUTES, Decision, Gate, Head, Route
from cowest_dspy.optimizers.router.observing import Observed, observe, observed_in

__all__ = [
    "ROUTES",
    "Curve",
    "Decision",
    "DraftLikelihood",
    "Gate",
    "Gated",
    "Head",
    "Observed",
    "Point",
    "Route",
    "draft_features",
    "fit_gate",
    "gate_curve",
    "observe",
    "observed_in",
]
