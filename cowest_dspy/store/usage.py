"""Usage: what calls took, as one value that adds up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any


def add_usd(one: float | None, other: float | None) -> float | None:
    """The sum of two costs; not known when one of them is not."""
    return None if one is None or other is None else one + other


def total_usd(costs: Iterable[float | None]) -> float | None:
    """The sum of all costs, 0.0 of none; not known when one of them is not."""
    return reduce(add_usd, costs, 0.0)


def format_usd(usd: float | None) -> str:
    """US dollars; "unknown" where the price of a part is not known.

    >>> format_usd(0.0), format_usd(0.00042), format_usd(1234.5), format_usd(None)
    ('0.00', '0.00042', '1,234.50', 'unknown')
    """
    if usd is None:
        return "unknown"
    return f"{usd:,.2f}" if usd == 0 or usd >= 0.1 else f"{usd:.2g}"


@dataclass(frozen=True)
class Usage:
    """The usage of calls: how many, their tokens, dollars and seconds.

    ``calls`` were made and answered, with ``tokens_in`` of their prompts and ``tokens_out`` that
    were generated; ``cached`` were answered from a store, ``failed`` got no answer. ``usd`` is US
    dollars for the calls made, None when the price of one of them is not known. ``seconds`` is the
    time at work.

    >>> Usage(calls=1, tokens_in=20, usd=0.5) + Usage(calls=2, tokens_in=10, usd=None)
    Usage(calls=3, cached=0, failed=0, tokens_in=30, tokens_out=0, usd=None, seconds=0.0)
    """

    calls: int = 0
    cached: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float | None = 0.0
    seconds: float = 0.0

    @classmethod
    def of_answer(cls, answer: Mapping[str, Any], seconds: float = 0.0) -> Usage:
        """The usage of one answered call, a dictionary of ``serialize.response_to_dict``."""
        return cls(
            calls=1,
            tokens_in=answer["input_tokens"],
            tokens_out=answer["output_tokens"],
            usd=answer["usd"],
            seconds=seconds,
        )

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.cached + other.cached,
            self.failed + other.failed,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            add_usd(self.usd, other.usd),
            self.seconds + other.seconds,
        )

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.tokens_in + self.tokens_out

    @property
    def only_read(self) -> bool:
        """Whether everything was answered from the store."""
        return self.cached > 0 and not self.calls and not self.failed


@dataclass(eq=False)
class UsageCounter:
    """A running sum of usage. Adding is not atomic: hold a lock where threads share one."""

    usage: Usage = Usage()

    def add(self, usage: Usage) -> None:
        """Add to the sum."""
        self.usage += usage

    def set_seconds(self, seconds: float) -> None:
        """Set the time at work, which is measured and not added up."""
        self.usage = replace(self.usage, seconds=seconds)
