"""What a run would ask of its models, before it is begun: calls counted from the configuration, the
rest scaled from one answer.

Calls are the most that can come: equal drafts are refined once, and what a run's store has is not
asked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.prompt_calls import asked
from cowest_dspy.lms.config import Api, LMSettings
from cowest_dspy.optimizers.config import StepRules


@dataclass(frozen=True)
class Planned:
    """A stage of ``cowest cycle`` and how many calls of each model it makes, at most.

    ``expected`` are the calls that are expected, where those are fewer and no probe tells.
    ``unknown`` says of whom nobody knows how often it asks.
    """

    stage: str
    weak: int
    strong: int
    judge: int = 0
    expected: Planned | None = None
    unknown: str = ""

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

    ``minutes`` with ``at_once`` calls under way, were each as fast as the one that was measured
    alone, and not faster than the limits of the table allow; ``minutes_one_by_one`` without that
    hope. ``usd`` is None when no price is known.
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
    """The calls of each stage of a cycle, when the splits have these ``sizes`` ("train", "dev", and
    that of [evaluate] split).

    With n drafts an example costs n + 1 strong calls, each of them [collect] answers times: one
    refines each draft, one answers alone. A judge rates each of them, [influence] repeats times.
    The metric of a task may ask models too: nobody knows how often.
    """
    train, tested, dev = sizes["train"], sizes[config.evaluate.split], sizes.get("dev", 0)
    wanted, rules = config.evaluate, config.influence
    ratings = rules.repeats if rules.judge else 0
    stages: list[Planned] = []
    steps = [name for name in config.cycle.names if name != "sft"] if config.cycle else ["weights"]
    first = 1
    for number, name in enumerate(steps, start=1):
        if name == "weights":
            stages += _rounds(config, train, dev, first)
            first += config.rounds.count
        else:
            assert config.cycle
            stages.append(
                _prompts(f"step {number} {name}", config.cycle.steps[name], train, dev, ratings)
            )
    if config.cycle:
        stages.append(
            Planned("valset", (len(steps) + 1) * dev, (len(steps) + 1) * dev)
        )  # The start, and what each step made.
    if rules.noise and config.strong.temperature != 0 and config.collect.answers == 1:
        again = min(rules.noise, train)
        stages.append(Planned("noise", 0, again, again * ratings))
    if wanted.weak:
        stages.append(Planned("evaluate weak", tested, 0))
    alone = ["strong", "strong_prompted"] if config.cycle and config.cycle.steps else ["strong"]
    stages += [Planned(f"evaluate {name}", 0, tested) for name in alone]
    stages += [
        Planned(f"evaluate {name}", tested, tested)
        for name in ("collaboration_sft", "collaboration", *wanted.controls)
    ]
    if wanted.oracle:
        stages.append(Planned("evaluate oracle", 0, tested))
    return tuple(stages)


def _rounds(config: Config, train: int, dev: int, first: int) -> list[Planned]:
    """The rounds of one step, from number ``first`` on. Before tuning and after it dev is asked;
    later rounds know what was before."""
    drafts, rules = config.collect.drafts, config.influence
    answers, ratings = (
        train * (drafts + 1) * config.collect.answers,
        rules.repeats if rules.judge else 0,
    )
    stages: list[Planned] = []
    for number in range(first, first + config.rounds.count):
        which = "" if number == 1 else f" {number}"
        stages.append(Planned(f"collect{which}", train * drafts, answers, answers * ratings))
        if dev:
            runs = 2 * dev if number == first else dev
            stages.append(Planned(f"dev{which}", runs, runs))
    return stages


def _prompts(stage: str, rules: StepRules, train: int, dev: int, ratings: int) -> Planned:
    """A prompt optimiser: its runs of the program, its proposals, and the answers alone that
    influence is measured against."""
    found = asked(rules, train, dev)
    if found is None:
        return Planned(stage, 0, 0, unknown=Path(rules.optimizer).name)
    alone = train + dev if found.judged else 0

    def planned(runs: int, proposals: int) -> Planned:
        return Planned(
            stage, runs, runs + alone + proposals, (runs + alone) * ratings if found.judged else 0
        )

    return replace(
        planned(found.most_runs, found.most_proposals),
        expected=planned(found.runs, found.proposals),
    )


def forecast(
    stages: tuple[Planned, ...], probe: Probe, settings: LMSettings, draft_tokens: int = 0
) -> Forecast:
    """The probe's numbers times the calls of its role. ``draft_tokens`` is what a draft adds to a
    prompt that refines it."""
    calls = sum(getattr(stage, probe.role) for stage in stages)
    refining = (
        calls - sum(stage.strong for stage in stages if stage.stage == "evaluate strong")
        if probe.role == "strong"
        else 0
    )
    input_tokens = calls * probe.input_tokens + refining * draft_tokens
    output_tokens = calls * probe.output_tokens
    one_by_one = calls * probe.seconds / 60
    at_once = max(1, min(settings.concurrency, calls))
    minutes = max(
        one_by_one / at_once, least_minutes(settings, calls, input_tokens + output_tokens)
    )
    return Forecast(
        probe.role, calls, at_once, input_tokens, output_tokens, minutes, max(one_by_one, minutes)
    )


def least_minutes(settings: LMSettings, calls: float, tokens: float) -> float:
    """The minutes that so many calls and tokens take at least, within the limits of an API's table;
    0 where there are none."""
    if not isinstance(settings, Api):
        return 0.0
    by_requests = calls / settings.requests_per_minute if settings.requests_per_minute else 0.0
    return max(
        by_requests, tokens / settings.tokens_per_minute if settings.tokens_per_minute else 0.0
    )
