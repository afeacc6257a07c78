"""What a run would ask of its models, before it is begun: calls counted from the configuration, the rest scaled from one answer.

Calls are the most that can come: equal drafts are refined once, and what a run's store has is not asked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cowest_dspy.config import Config
from cowest_dspy.tables import Api, LMSettings


@dataclass(frozen=True)
class Planned:
    """A stage of ``cowest cycle`` and how many calls of each model it makes, at most."""

    stage: str
    weak: int
    strong: int
    judge: int = 0

    @property
    def later(self) -> bool:
        """Whether it is of a round after the first, which may not come."""
        return self.stage.startswith(("collect ", "dev "))


@dataclass(frozen=True)
class Probe:
    """One answer that was measured: its first line, seconds, and tokens."""

    role: str
    model: str
    first_line: str
    seconds: float
    input_tokens: int
    output_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the whole call."""
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Forecast:
    """What one model would be asked in a whole cycle.

    ``minutes`` with ``at_once`` calls under way, were each as fast as the one that was measured alone, and not faster than the
    limits of the table allow; ``minutes_one_by_one`` without that hope. ``usd`` is None when no price is known.
    """

    role: str
    calls: int
    at_once: int
    input_tokens: int
    output_tokens: int
    minutes: float
    minutes_one_by_one: float
    usd: float | None = None


def planned_calls(config: Config, sizes: Mapping[str, int]) -> tuple[Planned, ...]:
    """The calls of each stage of a cycle, when the splits have these ``sizes`` ("train", "dev", and that of [evaluate] split).

    With n drafts an example costs n + 1 strong calls, each of them [collect] answers times: one refines each draft, one answers
    alone. A judge rates each of them, [influence] repeats times. The metric of a task may ask models too: nobody knows how often.
    """
    train, asked, drafts = sizes["train"], sizes[config.evaluate.split], config.collect.drafts
    wanted = config.evaluate
    rules = config.influence
    answers, ratings = train * (drafts + 1) * config.collect.answers, rules.repeats if rules.judge else 0
    stages = [Planned("collect", train * drafts, answers, answers * ratings)]
    dev = sizes.get("dev", 0)
    if dev:
        stages.append(Planned("dev", 2 * dev, 2 * dev))  # Before tuning and after it; later rounds know what was before.
    for number in range(2, config.rounds.count + 1):
        stages.append(Planned(f"collect {number}", train * drafts, answers, answers * ratings))
        stages.append(Planned(f"dev {number}", dev, dev))
    if rules.noise and config.strong.temperature != 0 and config.collect.answers == 1:
        again = min(rules.noise, train)
        stages.append(Planned("noise", 0, again, again * ratings))
    if wanted.weak:
        stages.append(Planned("evaluate weak", asked, 0))
    stages.append(Planned("evaluate strong", 0, asked))
    stages += [Planned(f"evaluate {name}", asked, asked) for name in ("collaboration_sft", "collaboration", *wanted.controls)]
    if wanted.oracle:
        stages.append(Planned("evaluate oracle", 0, asked))
    return tuple(stages)


def forecast(stages: tuple[Planned, ...], probe: Probe, settings: LMSettings, draft_tokens: int = 0) -> Forecast:
    """The probe's numbers times the calls of its role. ``draft_tokens`` is what a draft adds to a prompt that refines it."""
    calls = sum(getattr(stage, probe.role) for stage in stages)
    refining = calls - sum(stage.strong for stage in stages if stage.stage == "evaluate strong") if probe.role == "strong" else 0
    input_tokens = calls * probe.input_tokens + refining * draft_tokens
    output_tokens = calls * probe.output_tokens
    one_by_one = calls * probe.seconds / 60
    at_once = max(1, min(settings.concurrency, calls))
    minutes = max(one_by_one / at_once, least_minutes(settings, calls, input_tokens + output_tokens))
    return Forecast(probe.role, calls, at_once, input_tokens, output_tokens, minutes, max(one_by_one, minutes))


def least_minutes(settings: LMSettings, calls: float, tokens: float) -> float:
    """The minutes that so many calls and tokens take at least, within the limits of an API's table; 0 where there are none."""
    if not isinstance(settings, Api):
        return 0.0
    by_requests = calls / settings.requests_per_minute if settings.requests_per_minute else 0.0
    return max(by_requests, tokens / settings.tokens_per_minute if settings.tokens_per_minute else 0.0)
