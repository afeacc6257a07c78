"""What a run will cost, said before it is begun: calls, tokens, money and minutes, by stage and in
all, against [budget].

    with Experiment(config, "runs/handbook") as experiment:
        quote = probed(experiment, examples=3)
    print(quote.text())
    quote.exceeded          # ("usd: about 3.2 of 2",)

A few train examples are collected as a run would, through the run's store, so that the run itself
does not ask the same again. What they took, times what is left to do, is the quote. Tuning asks no
model and is in no sum. Prompt optimisers of [cycle]
are reckoned from their settings (prompt_calls.py); of one's own nobody knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cowest_dspy.errors import CollectionError
from cowest_dspy.experiment import data
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.forecast import Planned, least_minutes, planned_calls
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.metering import Measured, Meter
from cowest_dspy.influence.trace import FIRST_DRAFTS, Traces
from cowest_dspy.lms.config import LMSettings
from cowest_dspy.store.budget import Budget
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.usage import Usage

if TYPE_CHECKING:
    from cowest_dspy.experiment import Experiment

ROLES = ("weak", "strong", "judge")


@dataclass(frozen=True)
class Range:
    """A number of calls: at least, as the probe lets expect, at most."""

    least: float
    expected: float
    most: float

    def __add__(self, other: Range) -> Range:
        return Range(
            self.least + other.least, self.expected + other.expected, self.most + other.most
        )

    def times(self, factor: float) -> Range:
        """All three of them so many times."""
        return Range(self.least * factor, self.expected * factor, self.most * factor)

    def __str__(self) -> str:
        least, expected, most = (
            f"{number:,.0f}" for number in (self.least, self.expected, self.most)
        )
        return expected if least == most else f"{expected} ({least} to {most})"


NONE = Range(0, 0, 0)


@dataclass(frozen=True)
class StageQuote:
    """The calls of one stage by role, and what they take: None where nothing was measured, usd also
    where no price is known. ``unknown`` says of whom nobody knows how often it asks; the stage is
    then in no sum."""

    stage: str
    calls: dict[str, Range]
    tokens: Range | None
    usd: Range | None
    minutes: Range | None
    unknown: str = ""


@dataclass(frozen=True)
class Quote:
    """The stages of a cycle, what all of them take, the budget that it is held against, and what
    the probe itself has cost.

    ``before_sft``: the probe's drafts are those of a weak model that the run will have tuned before
        it collects. ``judged_by_strong``: the judge's calls are the strong model's, also for the
        budget.
    """

    stages: tuple[StageQuote, ...]
    budget: Budget | None
    probe: Usage | None = None
    examples: int = 0
    before_sft: bool = False
    judged_by_strong: bool = True

    @property
    def total(self) -> StageQuote:
        """All stages together, but for those of which nobody knows."""
        known = [stage for stage in self.stages if not stage.unknown]
        calls = {
            role: _sum(stage.calls.get(role, NONE) for stage in known) or NONE for role in ROLES
        }
        tokens, usd, minutes = (
            _sum(getattr(stage, name) for stage in known) for name in ("tokens", "usd", "minutes")
        )
        return StageQuote("in all", calls, tokens, usd, minutes)

    @property
    def exceeded(self) -> tuple[str, ...]:
        """The limits of [budget] that the run is expected to reach."""
        return tuple(
            f"{name}: about {_number(of.expected)} of {most:,}"
            for name, of, most in self._compared()
            if of.expected > most
        )

    @property
    def doubtful(self) -> tuple[str, ...]:
        """Those that it reaches only if it takes more than is expected."""
        found = [
            (name, of, most) for name, of, most in self._compared() if of.expected <= most < of.most
        ]
        return tuple(f"{name}: at most {_number(of.most)} of {most:,}" for name, of, most in found)

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Those that nothing is known of, since nothing was asked or a price is not known."""
        total, limits = self.total, self.budget or Budget()  # pyright: ignore[reportCallIssue]
        names = ("tokens", "usd", "minutes")
        return tuple(
            name
            for name in names
            if getattr(limits, name) is not None and getattr(total, name) is None
        )

    def table(self) -> list[list[str]]:
        """Rows of cells, the heading first: stage, calls of each role, tokens, USD, minutes; "?"
        where nobody knows."""
        rows = [["stage", *ROLES, "tokens", "USD", "minutes"]]
        for stage in (*self.stages, self.total):
            if stage.unknown:
                rows.append([stage.stage, *["?"] * 6])
                continue
            calls = [str(stage.calls.get(role, NONE)) for role in ROLES]
            rest = [
                _about(stage.tokens, ",.0f"),
                _about(stage.usd, ",.2f"),
                _about(stage.minutes, ",.1f"),
            ]
            rows.append([stage.stage, *calls, *rest])
        return rows

    def text(self) -> list[str]:
        """The quote as lines: what the probe cost, and how the whole compares with the budget."""
        lines: list[str] = []
        if self.probe is not None:
            asked = (
                f"{self.probe.calls} calls were made, {self.probe.cached} were in the run's "
                "store already"
            )
            price = "price not known" if self.probe.usd is None else f"{self.probe.usd:.4f} USD"
            again = (
                "drafts are of the model before [sft]"
                if self.before_sft
                else "the run does not make these calls again"
            )
            lines.append(f"From {self.examples} train examples: {asked}; {price}; {again}.")
        lines.append(
            "Expected (at least to at most). Equal drafts and adaptive sampling save calls; "
            "tuning is not in it."
        )
        if any(stage.stage.startswith("step ") and not stage.unknown for stage in self.stages):
            lines.append(
                "Steps of [cycle] are reckoned from their optimisers' settings: what is expected "
                "of them is an estimate."
            )
        for stage in self.stages:
            if stage.unknown:
                lines.append(
                    f"{stage.stage}: nobody knows how often {stage.unknown} asks. It is in no "
                    "sum, nor held against [budget]."
                )
        if self.budget is None or not self.budget.limited:
            return [*lines, "There is no [budget]."]
        if self.exceeded:
            return [*lines, f"[budget] is exceeded: {'; '.join(self.exceeded)}."]
        if self.unmeasured:
            asking = (
                "leave out --no-ask to ask a few questions for it"
                if self.probe is None
                else "a price is not known"
            )
            return [
                *lines,
                (
                    f"Whether [budget] fits is not known for {' and '.join(self.unmeasured)}: "
                    f"{asking}."
                ),
            ]
        return [
            *lines,
            f"[budget] fits, but may be reached: {'; '.join(self.doubtful)}."
            if self.doubtful
            else "[budget] fits.",
        ]

    def _compared(self) -> list[tuple[str, Range, float]]:
        total, limits = self.total, self.budget or Budget()  # pyright: ignore[reportCallIssue]
        judged = total.calls["judge"] if self.judged_by_strong else NONE
        rows = [
            ("strong_calls", total.calls["strong"] + judged, limits.strong_calls),
            ("tokens", total.tokens, limits.tokens),
            ("usd", total.usd, limits.usd),
            ("minutes", total.minutes, limits.minutes),
        ]
        return [(name, of, most) for name, of, most in rows if of is not None and most is not None]


def counted(config: Config) -> Quote:
    """Calls only, from the configuration and the sizes of its splits. Nothing is asked, loaded or
    written."""
    stages = planned_calls(
        config, {split: len(data.configured_split(config.data, split)) for split in data.SPLITS}
    )
    made = [
        StageQuote(stage.stage, _bounds(config, stage, None), None, None, None, stage.unknown)
        for stage in stages
    ]
    return Quote(tuple(made), config.budget)


def probed(experiment: Experiment, examples: int = 3) -> Quote:
    """A quote from the first so many train examples, each collected as a run would: all of its
    drafts, refined and scored.

    Raises:
        CollectionError: a model gave no answer at all, so that nothing was measured.
        BudgetError: the budget does not even allow the probe.
    """
    config, splits = experiment.config, experiment.splits
    program = experiment.program.bind(weak=experiment.weak, strong=experiment.strong)
    meter = Meter(experiment.store, program.weak.model)
    chosen = splits["train"][:examples]
    with experiment.store.spending("quote") as counter, keeping(meter):
        traces = collect(
            program,
            chosen,
            meter.as_judge(experiment.evaluator),
            experiment.sampling,
            num_threads=config.at_once("strong"),
            weak_threads=config.at_once("weak"),
            answers=config.collect.answers,
            max_errors=1.0,
        )
    measured = {role: found for role in ROLES if (found := meter.measured(role))}
    _check(traces, measured)
    done = _Done.of(config, len(chosen), traces, measured)
    stages = planned_calls(config, {split: len(found) for split, found in splits.items()})
    made = tuple(_stage(config, stage, done) for stage in stages)
    return Quote(
        made,
        config.budget,
        counter.usage,
        len(chosen),
        config.sft is not None,
        config.judge is None,
    )


@dataclass(frozen=True)
class _Done:
    """What the probe did: examples, drafts sampled, answers asked for, and what the calls of each
    role took."""

    examples: int
    drafts: int
    answers: int
    measured: dict[str, Measured]

    @classmethod
    def of(
        cls, config: Config, examples: int, traces: Traces, measured: dict[str, Measured]
    ) -> _Done:
        rules, saved = config.collect, traces.saved
        answers = rules.answers * (rules.drafts + 1) * examples - saved["strong_calls"]
        return cls(examples, rules.drafts * examples - saved["weak_calls"], answers, measured)

    def calls_per(self, role: str) -> float:
        """Calls of a role for one draft, if it is weak, or for one answer."""
        found = self.measured.get(role)
        return (
            found.calls / max(self.drafts if role == "weak" else self.answers, 1) if found else 0.0
        )


def _check(traces: Traces, measured: dict[str, Measured]) -> None:
    missing = [role for role in ("weak", "strong") if role not in measured]
    errors = [trace.error for trace in traces if trace.error]
    if missing:
        why = f" The first failure: {errors[0]}." if errors else ""
        raise CollectionError(
            f"The {missing[0]} model gave no answer, so that there is nothing to reckon "
            f"with.{why} Try `cowest doctor`."
        )


def _bounds(config: Config, stage: Planned, done: _Done | None) -> dict[str, Range]:
    """The calls of a stage by role. Collecting needs fewer than planned where drafts are equal or
    enough; the rest is exact. Rounds after the first may not come at all."""
    if stage.later:
        certain = _bounds(config, replace(stage, stage=stage.stage.partition(" ")[0]), done)
        return {role: replace(calls, least=0) for role, calls in certain.items()}
    if stage.expected:
        most, expected = (
            _bounds(config, one, done) for one in (replace(stage, expected=None), stage.expected)
        )
        return {role: Range(0, expected[role].most, most[role].most) for role in most}
    if stage.stage != "collect":
        # What was measured of a judge is its calls for one answer.
        judged = stage.strong if done and stage.judge else stage.judge
        asked = {"weak": stage.weak, "strong": stage.strong, "judge": judged}
        return {
            role: _exactly(count * (done.calls_per(role) if done else 1))
            for role, count in asked.items()
        }
    rules = config.collect
    drafts = stage.weak
    fewest = drafts // rules.drafts * (FIRST_DRAFTS if rules.adaptive else rules.drafts)
    answers = drafts // rules.drafts * rules.answers
    weak, strong = Range(fewest, drafts, drafts), Range(2 * answers, stage.strong, stage.strong)
    if done is None:
        return {"weak": weak, "strong": strong, "judge": strong.times(stage.judge / stage.strong)}
    train = drafts / rules.drafts
    weak = Range(fewest, train * done.drafts / done.examples, drafts).times(done.calls_per("weak"))
    strong = Range(2 * answers, train * done.answers / done.examples, stage.strong)
    return {
        "weak": weak,
        **{role: strong.times(done.calls_per(role)) for role in ("strong", "judge")},
    }


def _exactly(count: float) -> Range:
    return Range(count, count, count)


def _stage(config: Config, stage: Planned, done: _Done) -> StageQuote:
    calls = _bounds(config, stage, done)
    if stage.unknown:
        return StageQuote(stage.stage, calls, None, None, None, stage.unknown)
    tokens, usd, minutes = NONE, NONE, NONE
    for role, found in done.measured.items():
        asked = calls.get(role, NONE)
        tokens += asked.times(found.input_tokens + found.output_tokens)
        usd = (
            None
            if usd is None or (found.usd is None and asked.most)
            else usd + asked.times(found.usd or 0.0)
        )
        minutes += _minutes(config, role, found, asked)
    return StageQuote(stage.stage, calls, tokens, usd, minutes)


def _minutes(config: Config, role: str, found: Measured, asked: Range) -> Range:
    """With as many calls at once as the table allows, each as fast as those that were measured, and
    within its limits."""
    settings: LMSettings = getattr(config, role, None) or config.strong

    def minutes(count: float) -> float:
        at_once = max(1.0, min(config.at_once(role), count))
        tokens = count * (found.input_tokens + found.output_tokens)
        return max(count * found.seconds / 60 / at_once, least_minutes(settings, count, tokens))

    return Range(minutes(asked.least), minutes(asked.expected), minutes(asked.most))


def _sum(ranges: Iterable[Range | None]) -> Range | None:
    """The sum; not known when a part is not."""
    total: Range | None = NONE
    for one in ranges:
        total = None if total is None or one is None else total + one
    return total


def _about(number: Range | None, form: str) -> str:
    return "?" if number is None else format(number.expected, form)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
