"""The table [sft]."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cowest_dspy.utils.table import Table


class Sft(Table):
    """[sft]: domain fine-tuning. ``drafts`` and ``answers`` name functions of a seed that give
    prompt/completion rows."""

    drafts: str = Field(description="rows that teach the weak model to draft")
    answers: str | None = Field(
        None, description="rows that teach it to answer alone: the fair weak baseline"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.SFT")
    answer_settings: dict[str, Any] = Field(
        default_factory=dict, description="as cowest_dspy.tuning.SFT"
    )
