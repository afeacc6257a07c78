"""What the preference tuning of a configuration would take, before there is anything to train on:
for the doctor and the quote.

    line, fits = tuning_forecast(config, 2000, Lengths(2000, 300, 180, 60),
    Path("models/SmolLM2-135M-Instruct"))

At most one pair of each train example is reckoned with, or for KTO every draft: the gate drops
some, so that it will be less.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cowest_dspy.experiment.config import Config, validate
from cowest_dspy.tuning import DPO, KTO, Estimate, Lengths, foreseen


class Foretold(NamedTuple):
    """A line for people, and whether there is room for it."""

    text: str
    fits: bool


def tuning_forecast(
    config: Config,
    train: int,
    prompt: float,
    completion: float,
    folder: Path,
    *,
    longest: int | None = None,
    free: float | None = None,
) -> Foretold | None:
    """Of one round's [dpo] or [kto] on drafts of ``train`` examples; None where the model's folder
    does not tell.

    ``prompt`` and ``completion``: tokens of a draft's prompt and of a draft. ``longest``: of both
    together, by default 1.5 times their sum. ``free``: bytes, by default what is free now.
    """
    kto = config.kto is not None
    settings = (
        validate(KTO, config.kto or {}, "[kto]") if kto else validate(DPO, config.dpo, "[dpo]")
    )
    rows, sides = (train * config.collect.drafts, 1) if kto else (train, 2)
    lengths = Lengths(
        max(1, rows), longest or round(1.5 * (prompt + completion)), prompt, completion, sides
    )
    found = foreseen(settings, lengths, folder, further=config.sft is not None)
    if found is None:
        return None
    made = found if free is None else replace(found, free=free)
    return Foretold(_said(made, "KTO" if kto else "DPO", rows), made.fits)


def _said(made: Estimate, kind: str, rows: int) -> str:
    what = f"{kind} on at most {rows:,} {'drafts' if kind == 'KTO' else 'pairs'}: {made}"
    warning = made.warning()
    return f"{what}. Warning: {warning}" if warning else what
