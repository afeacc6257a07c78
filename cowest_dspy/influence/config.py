"""The tables [collect] and [influence]."""

from __future__ import annotations

from pydantic import Field, model_validator

from cowest_dspy.utils.table import Reference, TomlTable

MAX_ERRORS = 0.3
"""The largest share of drafts that may fail, unless one says otherwise."""


class Collect(TomlTable):
    """[collect]: sampling of drafts and measurement of their influence."""

    drafts: int = Field(4, ge=2, description="drafts sampled for each example")
    temperature: float = Field(
        1.0, gt=0, le=2, description="of the drafts: higher ones differ more, and fail more often"
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="drafts are sampled from the likeliest tokens that together have this part",
    )
    adaptive: bool = Field(
        False,
        description="stop sampling an example when it has a pair with [pairs] margin, or hardly "
        "will",
    )
    answers: int = Field(
        1,
        ge=1,
        description="answers of a strong model that samples, with and without a draft: scores are "
        "averaged",
    )
    max_errors: float = Field(
        MAX_ERRORS, ge=0, le=1, description="the run stops when a larger share of the drafts fails"
    )


class InfluenceRules(TomlTable):
    """[influence]: what gives an answer its score when drafts are compared; by default the metric
    alone."""

    metric: float = Field(1.0, ge=0, description="weight of the task's metric")
    judge: float = Field(
        0.0,
        ge=0,
        description="weight of the judge, a model that rates by a rubric: [judge], or the strong "
        "one",
    )
    likelihood: float = Field(
        0.0,
        ge=0,
        description="weight of the gold answer's probability under the strong model (in_process "
        "only)",
    )
    gold: str = Field(
        "answer", description="the field with the gold answer, for judge and likelihood"
    )
    rubric: Reference | None = Field(
        None,
        description='"recipe.py:name", a Rubric; by default coherence and consistency, as in '
        "CoWest",
    )
    repeats: int = Field(
        1,
        ge=1,
        description="how often a judge that samples is asked about one answer; ratings are "
        "averaged",
    )
    noise: int = Field(
        0,
        ge=0,
        description="train examples that the strong model alone answers twice, for the noise "
        "floor: one call each",
    )

    @model_validator(mode="after")
    def _something_scores(self) -> InfluenceRules:
        if not self.metric + self.judge + self.likelihood:
            raise ValueError(
                "metric, judge and likelihood are all 0: nothing would score an answer"
            )
        if self.repeats > 1 and not self.judge:
            raise ValueError("repeats is of the judge, and judge is 0: give it a weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The evaluators that count, with their weights."""
        every = {"metric": self.metric, "judge": self.judge, "likelihood": self.likelihood}
        return {name: weight for name, weight in every.items() if weight}
