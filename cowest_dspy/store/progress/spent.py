"""What a stretch of work cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cowest_dspy.store.budget import added


@dataclass
class Spent:
    """What a stretch of work cost: calls made and answered from the store, failures, and tokens of
    the calls made.

    ``usd`` is US dollars for the calls made; None as soon as the price of one of them is not known.
    ``seconds`` is the time at work on it in all processes of a run, known at its end.
    """

    calls: int = 0
    cached: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float | None = 0.0
    seconds: float = 0.0

    @property
    def only_read(self) -> bool:
        """Whether the work was answered from the store alone."""
        return self.cached > 0 and not self.calls and not self.failed

    def answered(self, answer: Mapping[str, Any]) -> None:
        """Books an answer that was made and committed."""
        self.calls += 1
        self.input_tokens += answer["input_tokens"]
        self.output_tokens += answer["output_tokens"]
        self.usd = added(self.usd, answer["usd"])
