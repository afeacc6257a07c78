"""The numbers of a side-by-side view as rows of text, a cell for each run; the same ones in a
terminal and on the page."""

from __future__ import annotations

from cowest_dspy.report.side_by_side.model import ArmCell, RunColumn, SideBySide
from cowest_dspy.report.verdict import (
    format_interval,
    format_p,
    format_points,
    format_share,
    format_usd,
)

NOTHING = "-"


def scores(view: SideBySide) -> dict[str, tuple[str, ...]]:
    """For each arm its score in every run: ``66.7 % [51.4, 79.2], n 40, 2 failed``."""
    return {
        title: tuple(score(run.arm(name)) for run in view.runs) for name, title in view.arms.items()
    }


def score(arm: ArmCell | None) -> str:
    """The score of one arm of one run, or a dash where it was not evaluated."""
    if arm is None:
        return NOTHING
    span = f" [{format_interval(arm.interval).replace(' to ', ', ')}]" if arm.interval else ""
    failed = f", {arm.failed} failed" if arm.failed else ""
    return f"{format_share(arm.score)}{span}, n {arm.n}{failed}"


def facts(view: SideBySide) -> dict[str, tuple[str, ...]]:
    """What else is said of each run: tuning, rounds, costs, models."""
    rows = {
        "test examples": tuple(f"{run.examples:,}" for run in view.runs),
        "seed": tuple(str(run.seed) for run in view.runs),
        "what tuning did": tuple(_tuning(run) for run in view.runs),
        "pairs": tuple(NOTHING if run.pairs is None else f"{run.pairs:,}" for run in view.runs),
        "rounds": tuple("\n".join(run.rounds) or NOTHING for run in view.runs),
        "calls": tuple(
            f"{run.calls:,}" + (f" (and {run.cached:,} from the store)" if run.cached else "")
            for run in view.runs
        ),
        "tokens": tuple(f"{run.tokens:,}" for run in view.runs),
        "USD": tuple(format_usd(run.usd) for run in view.runs),
        "seconds": tuple(f"{run.seconds:,.0f}" for run in view.runs),
    }
    roles = dict.fromkeys(role for run in view.runs for role in run.models)
    models = {
        f"{role} model": tuple(run.models.get(role, NOTHING) for run in view.runs) for role in roles
    }
    return {**rows, **models, "report of": tuple(run.created for run in view.runs)}


def _tuning(run: RunColumn) -> str:
    test = run.tuning
    if test is None or test.difference is None:
        return NOTHING
    return (
        f"{format_points(test)}, fixed {test.fixed}, broke {test.broken} of {test.n}, "
        f"{format_p(test.p)}"
    )
