"""The table [pairs]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cowest_dspy.utils.table import TomlTable, resolve_reference

LEAST_PAIRS = 8
"""Fewer preference pairs (or labelled drafts) are not trained on, unless one says otherwise."""


class PairRules(TomlTable):
    """[pairs]: which drafts become a preference pair."""

    margin: float = Field(
        0.5, gt=0, le=2, description="smallest difference of influence between chosen and rejected"
    )
    strategy: Literal["ranked", "paper", "all"] = Field(
        "ranked",
        description="best against worst; all that helped against all that did not; all with the "
        "margin",
    )
    per_example: int | None = Field(
        None,
        ge=1,
        description='pairs of one example, at most; by default 1 if "ranked", else any number',
    )
    near: float = Field(
        0.95, gt=0, le=1, description="texts that are at least so similar are no pair"
    )
    leak: str | None = Field(
        None, description="a gold field that a chosen draft must not say, where that is cheating"
    )
    length_ratio: float | None = Field(
        None, ge=1, description="the longer text of a pair by the shorter one, in words, at most"
    )
    least: int = Field(LEAST_PAIRS, ge=1, description="fewer pairs than this are not trained on")
    most: int | None = Field(
        None,
        ge=1,
        description="use so many pairs of a round, drawn with the run's seed; all by default",
    )
    source: Annotated[str, Field(pattern=r"\.jsonl$"), AfterValidator(resolve_reference)] | None = (
        Field(None, description="pairs from elsewhere, instead of the run's own")
    )
