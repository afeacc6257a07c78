"""What a run will cost, before it is begun: calls, tokens, money and minutes, by stage and in all,
against [budget].

    with Experiment(config, "runs/handbook") as experiment:
        quote = quote_by_probe(experiment, examples=3)
    print(quote.text())
    quote.exceeded          # ("usd: about 3.2 of 2",)
    quote.describe_power()  # "120 test questions show a difference of 11.3 points or more (...)."

A few train examples are collected as a run would, through the run's store, so that the run itself
does not ask the same again. What they took, times what is left to do, is the quote. Tuning asks no
model and is in no sum. Calls of prompt optimisers of [cycle] are estimated from their settings; of
one's own nobody knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dspy

from cowest_dspy import compat
from cowest_dspy.errors import CollectionError
from cowest_dspy.experiment.arms import arm_names
from cowest_dspy.experiment.config import ROLES, Config
from cowest_dspy.experiment.data import load_program, load_splits
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.metering import Measured, Meter
from cowest_dspy.influence.statistics import SMALLEST, detectable_difference, questions_needed
from cowest_dspy.influence.trace import FIRST_DRAFTS, Traces
from cowest_dspy.lms.config import Api, LMSettings
from cowest_dspy.optimizers.config import StepRules
from cowest_dspy.report.verdict import format_about
from cowest_dspy.store.budget import Budget
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.usage import Usage

if TYPE_CHECKING:
    from cowest_dspy.experiment import Experiment


@dataclass(frozen=True)
class Range:
    """A number of calls: at least, expected, at most."""

    least: float
    expected: float
    most: float

    def __add__(self, other: Range) -> Range:
        return Range(
            self.least + other.least, self.expected + other.expected, self.most + other.most
        )

    def times(self, factor: float) -> Range:
        """All three numbers times ``factor``."""
        return Range(self.least * factor, self.expected * factor, self.most * factor)

    def __str__(self) -> str:
        least, expected, most = (
            f"{number:,.0f}" for number in (self.least, self.expected, self.most)
        )
        return expected if least == most else f"{expected} ({least} to {most})"


def exactly(count: float) -> Range:
    """A number that is certain."""
    return Range(count, count, count)


def up_to(expected: float, most: float) -> Range:
    """A number that may be nothing."""
    return Range(0, expected, most)


NONE = exactly(0)
ASSUMED = 0.2
"""The share of questions that only one of two arms gets right, while none has been measured."""


# How many calls


@dataclass(frozen=True)
class StageCalls:
    """What a stage of ``cowest cycle`` asks for: drafts of the weak model, answers of the strong
    one, and how many answers the evaluator of [influence] scores.

    ``unknown`` names an optimiser that may ask any number of times.
    """

    stage: str
    drafts: Range = NONE
    answers: Range = NONE
    scored: Range = NONE
    unknown: str = ""


def count_calls(
    config: Config, sizes: Mapping[str, int], probe: Probe | None = None
) -> list[StageCalls]:
    """The stages of a cycle, when the splits have these ``sizes`` ("train", "dev", and that of
    [evaluate] split). A ``probe`` says how many drafts and answers an example is expected to take.
    """
    train, dev, tested = sizes["train"], sizes.get("dev", 0), sizes[config.evaluate.split]
    steps = [name for name in config.cycle.names if name != "sft"] if config.cycle else ["weights"]
    stages: list[StageCalls] = []
    first = 1
    for number, name in enumerate(steps, start=1):
        if name == "weights":
            stages += _count_rounds(config, train, dev, first, probe)
            first += config.rounds.count
        else:
            assert config.cycle
            stages.append(
                _count_step(f"step {number} {name}", config.cycle.steps[name], train, dev)
            )
    if config.cycle:  # The start, and what each step made.
        runs = exactly((len(steps) + 1) * dev)
        stages.append(StageCalls("valset", runs, runs))
    if config.influence.noise and config.strong.temperature != 0 and config.collect.answers == 1:
        again = exactly(min(config.influence.noise, train))
        stages.append(StageCalls("noise", NONE, again, again))
    asked = exactly(tested)
    for name in arm_names(config, routed=False):
        drafts = NONE if name in ("strong", "strong_prompted", "oracle") else asked
        stages.append(StageCalls(f"evaluate {name}", drafts, NONE if name == "weak" else asked))
    return stages


def _count_rounds(
    config: Config, train: int, dev: int, first: int, probe: Probe | None
) -> list[StageCalls]:
    """The rounds of one step, from number ``first`` on. With n drafts an example costs n + 1 strong
    calls, each [collect] answers times; fewer where drafts are equal, or two are enough. Before
    tuning and after it dev is asked; later rounds know what was before, and may not come at all."""
    rules = config.collect
    fewest = min(FIRST_DRAFTS, rules.drafts) if rules.adaptive else rules.drafts
    drafts = Range(fewest, probe.drafts if probe else rules.drafts, rules.drafts).times(train)
    most = rules.answers * (rules.drafts + 1)
    answers = Range(2 * rules.answers, probe.answers if probe else most, most).times(train)
    stages: list[StageCalls] = []
    for number in range(first, first + config.rounds.count):
        runs = exactly(2 * dev if number == first else dev)
        suffix = f" {number}" if number > 1 else ""
        if number > 1:
            drafts, answers, runs = (replace(one, least=0) for one in (drafts, answers, runs))
        stages.append(StageCalls(f"collect{suffix}", drafts, answers, answers))
        if dev:
            stages.append(StageCalls(f"dev{suffix}", runs, runs))
    return stages


# Calls of prompt optimisers


@dataclass(frozen=True)
class StepCalls:
    """Runs of the program (a draft and its refinement), and prompts that the strong model is asked
    to write. ``judged``: the step's metric is the influence, so that each example is answered
    alone, too."""

    runs: Range
    prompts: Range = NONE
    judged: bool = False


def _count_step(stage: str, rules: StepRules, train: int, dev: int) -> StageCalls:
    found = count_step(rules, train, dev)
    if found is None:
        return StageCalls(stage, unknown=Path(rules.optimizer).name)
    alone = train + dev if found.judged else 0
    answers = found.runs + up_to(alone, alone)
    return StageCalls(stage, found.runs, answers + found.prompts, answers if found.judged else NONE)


def count_step(rules: StepRules, train: int, dev: int) -> StepCalls | None:
    """What a step asks when the splits have these sizes; None for an optimiser of one's own.

    GEPA's runs are its budget, and what one more try may take. What bootstraps demonstrations is
    expected to find every second answer right, and at most to try every train example. SIMBA's and
    MIPROv2's trials are counted; how many prompts they have written is estimated. What the settings
    leave open has DSPy's defaults.
    """
    count = _STEPS.get(rules.optimizer)
    if count is None:
        return None
    optimizer = getattr(dspy, rules.optimizer)
    settings: dict[str, Any] = {}
    for given in (
        _defaults(optimizer.__init__),
        _defaults(optimizer.compile),
        rules.settings,
        rules.compile,
    ):
        settings |= {name: value for name, value in given.items() if value is not None}
    return count(settings, 2 if rules.target == "both" else 1, train, dev)


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _count_gepa(settings: dict[str, Any], predictors: int, train: int, dev: int) -> StepCalls:
    if settings.get("auto"):
        from dspy.teleprompt.gepa.gepa import AUTO_RUN_SETTINGS

        candidates = AUTO_RUN_SETTINGS[settings["auto"]]["n"]
        budget = cast("Any", dspy.GEPA).auto_budget(None, predictors, candidates, dev)
    else:
        full = settings.get("max_full_evals", 0) * (train + dev)
        budget = settings.get("max_metric_calls") or full
    batch = settings["reflection_minibatch_size"]
    budget = max(budget, dev)
    # It looks at its limit between two tries. A try runs the program on a minibatch, has prompts
    # written, and runs it there again; or runs a merged program on 5 examples; then on all of dev.
    most = budget + max(2 * batch, 5) + dev
    parts = predictors if settings.get("component_selector") == "all" else 1
    tries, most_tries = -(-(budget - dev) // (2 * batch)), -(-(budget - dev) // batch)
    prompts = up_to(parts * tries, parts * most_tries)
    return StepCalls(up_to(budget, most), prompts, judged=True)


def _count_miprov2(settings: dict[str, Any], predictors: int, train: int, dev: int) -> StepCalls:
    shots = max(settings["max_bootstrapped_demos"], settings["max_labeled_demos"])
    minibatch = settings["minibatch"]
    candidates = instructions = settings.get("num_candidates", 0)
    trials = settings.get("num_trials", 0)
    if not candidates:
        from dspy.teleprompt.mipro_optimizer_v2 import AUTO_RUN_SETTINGS, MIN_MINIBATCH_SIZE

        auto = AUTO_RUN_SETTINGS[settings["auto"]]
        candidates, dev = auto["n"], min(dev, auto["val_size"])
        minibatch = dev > MIN_MINIBATCH_SIZE
        trials = compat.count_mipro_trials(predictors, not shots, candidates)
        instructions = candidates // 2 if shots else candidates
    every = settings["minibatch_full_eval_steps"]
    # The program as it was; then trials, and between them the best so far on all of dev.
    full = trials // every + 1 + (trials % every != 0) if minibatch else 0
    evaluated = dev + trials * (settings["minibatch_size"] if minibatch else dev) + full * dev
    sets = _bootstrapped(settings["max_bootstrapped_demos"] if shots else 3, 1, train)
    about = predictors + 1 if settings["program_aware_proposer"] else 0
    most = 12 + 3 * max(instructions, candidates) * predictors
    return StepCalls(
        up_to(evaluated, evaluated) + sets.times(max(0, candidates - 2)),
        up_to(10 + instructions * predictors + about, most),
    )


def _count_simba(settings: dict[str, Any], predictors: int, train: int, dev: int) -> StepCalls:
    steps, batch, candidates = (settings[key] for key in ("max_steps", "bsize", "num_candidates"))
    runs = steps * batch * (2 * candidates + 1) + min(candidates + 1, steps + 1) * train
    # Each candidate gets a demonstration or a rule; only a rule is written by a model.
    rules = steps * (candidates + 1)
    rules = rules // 2 if settings["max_demos"] else rules
    return StepCalls(up_to(runs, runs), up_to(rules, steps * batch))


def _count_few_shot(settings: dict[str, Any], predictors: int, train: int, dev: int) -> StepCalls:
    return StepCalls(
        _bootstrapped(settings["max_bootstrapped_demos"], settings["max_rounds"], train)
    )


def _count_search(settings: dict[str, Any], predictors: int, train: int, dev: int) -> StepCalls:
    programs = settings["num_candidate_programs"]
    sets = _bootstrapped(settings["max_bootstrapped_demos"], settings["max_rounds"], train)
    evaluated = (programs + 3) * dev
    return StepCalls(up_to(evaluated, evaluated) + sets.times(programs + 1))


def _bootstrapped(demos: int, rounds: int, train: int) -> Range:
    """Runs that it takes to find so many demonstrations, when every second answer is right."""
    return up_to(min(train, 2 * demos), train * rounds)


_STEPS: dict[str, Callable[[dict[str, Any], int, int, int], StepCalls]] = {
    "GEPA": _count_gepa,
    "MIPROv2": _count_miprov2,
    "SIMBA": _count_simba,
    "BootstrapFewShot": _count_few_shot,
    "BootstrapFewShotWithRandomSearch": _count_search,
    "LabeledFewShot": lambda *_: StepCalls(NONE),
}


# What they take


@dataclass(frozen=True)
class StageQuote:
    """The calls of one stage by role, and what they take: None where nothing was measured, usd also
    where no price is known. A stage with an ``unknown`` optimiser is in no sum."""

    stage: str
    calls: dict[str, Range]
    tokens: Range | None = None
    usd: Range | None = None
    minutes: Range | None = None
    unknown: str = ""


@dataclass(frozen=True)
class Probe:
    """What was measured: ``measured`` calls by role; drafts and answers of an example, and in all
    ``examples``; and what that has cost."""

    examples: int
    drafts: float
    answers: float
    measured: dict[str, Measured]
    usage: Usage

    def calls_per(self, role: str) -> float:
        """Calls of a role for one draft, if it is weak, or for one answer."""
        found = self.measured.get(role)
        asked = self.examples * (self.drafts if role == "weak" else self.answers)
        return found.calls / max(asked, 1) if found else 0.0


@dataclass(frozen=True)
class Quote:
    """The stages of a cycle, the configuration whose [budget] they are held against, the number of
    ``questions`` that arms will be compared on, and the probe that they were measured by."""

    stages: tuple[StageQuote, ...]
    config: Config
    questions: int
    probe: Probe | None = None

    @property
    def total(self) -> StageQuote:
        """All stages together, without those of which nobody knows."""
        known = [stage for stage in self.stages if not stage.unknown]
        calls = {role: sum((stage.calls[role] for stage in known), start=NONE) for role in ROLES}
        tokens, usd, minutes = (
            _sum(getattr(stage, name) for stage in known) for name in ("tokens", "usd", "minutes")
        )
        return StageQuote("in all", calls, tokens, usd, minutes)

    @property
    def exceeded(self) -> tuple[str, ...]:
        """The limits of [budget] that the run is expected to reach."""
        return tuple(
            f"{name}: about {_number(takes.expected)} of {limit:,}"
            for name, takes, limit in self._limits()
            if takes and takes.expected > limit
        )

    @property
    def doubtful(self) -> tuple[str, ...]:
        """The limits that it reaches only if it takes more than is expected."""
        return tuple(
            f"{name}: at most {_number(takes.most)} of {limit:,}"
            for name, takes, limit in self._limits()
            if takes and takes.expected <= limit < takes.most
        )

    def table(self) -> list[list[str]]:
        """Rows of cells, the heading first: stage, calls of each role, tokens, USD, minutes; "?"
        where nobody knows."""
        rows = [["stage", *ROLES, "tokens", "USD", "minutes"]]
        for stage in (*self.stages, self.total):
            calls = ["?" if stage.unknown else str(stage.calls[role]) for role in ROLES]
            takes = ((stage.tokens, ",.0f"), (stage.usd, ",.2f"), (stage.minutes, ",.1f"))
            rest = [format(one.expected, form) if one else "?" for one, form in takes]
            rows.append([stage.stage, *calls, *rest])
        return rows

    def text(self) -> list[str]:
        """The quote as lines: what the probe cost, and how the whole compares with the budget."""
        lines = [self._describe_probe(self.probe)] if self.probe else []
        lines.append(
            "Expected (at least to at most). Equal drafts and adaptive sampling save calls; "
            "tuning is not in it."
        )
        if any(stage.stage.startswith("step ") and not stage.unknown for stage in self.stages):
            lines.append(
                "Steps of [cycle] are reckoned from their optimisers' settings: what is expected "
                "of them is an estimate."
            )
        lines += [
            f"{stage.stage}: nobody knows how often {stage.unknown} asks. It is in no "
            "sum, nor held against [budget]."
            for stage in self.stages
            if stage.unknown
        ]
        return [*lines, self.describe_power(), self._compare_with_budget()]

    def describe_power(self) -> str:
        """The difference between two arms that the questions can show, and how many the smallest
        one worth finding needs, both for a metric of right and wrong."""
        rules, split = self.config.compare, self.config.evaluate.split
        smallest = rules.smallest if rules else SMALLEST
        found = detectable_difference(self.questions, ASSUMED)
        if found is None:
            return f"{self.questions} {split} questions are too few to show any difference."
        needed = questions_needed(smallest / 100, ASSUMED)
        more = f"; {smallest:g} points need about {format_about(needed)}"
        return (
            f"{self.questions:,} {split} questions show a difference of {100 * found:.1f} points "
            f"or more (80 % power, if one arm alone is right on {100 * ASSUMED:g} % of them)"
            f"{more if needed > self.questions else ''}."
        )

    def _describe_probe(self, probe: Probe) -> str:
        usage = probe.usage
        price = "price not known" if usage.usd is None else f"{usage.usd:.4f} USD"
        again = (
            "drafts are of the model before [sft]"
            if self.config.sft
            else "the run does not make these calls again"
        )
        return (
            f"From {probe.examples} train examples: {usage.calls} calls were made, {usage.cached} "
            f"were in the run's store already; {price}; {again}."
        )

    def _compare_with_budget(self) -> str:
        if self.config.budget is None or not self.config.budget.limited:
            return "There is no [budget]."
        if self.exceeded:
            return f"[budget] is exceeded: {'; '.join(self.exceeded)}."
        unknown = [name for name, takes, _ in self._limits() if takes is None]
        if unknown:
            why = (
                "a price is not known"
                if self.probe
                else "leave out --no-ask to ask a few questions for it"
            )
            return f"Whether [budget] fits is not known for {' and '.join(unknown)}: {why}."
        if self.doubtful:
            return f"[budget] fits, but may be reached: {'; '.join(self.doubtful)}."
        return "[budget] fits."

    def _limits(self) -> list[tuple[str, Range | None, float]]:
        """The limits of [budget] with what the run takes of each, None where that is not known."""
        total, limits = self.total, self.config.budget or Budget()  # pyright: ignore[reportCallIssue]
        judged = NONE if self.config.judge else total.calls["judge"]
        takes = {
            "strong_calls": total.calls["strong"] + judged,
            "tokens": total.tokens,
            "usd": total.usd,
            "minutes": total.minutes,
        }
        return [
            (name, one, limit)
            for name, one in takes.items()
            if (limit := getattr(limits, name)) is not None
        ]


def quote_by_counting(config: Config) -> Quote:
    """Calls only, from the configuration and the sizes of its splits. Nothing is asked, loaded or
    written."""
    splits = load_splits(config, load_program(config))
    sizes = {split: len(examples) for split, examples in splits.items()}
    made = tuple(_quote_stage(config, stage, None) for stage in count_calls(config, sizes))
    return Quote(made, config, sizes[config.evaluate.split])


def quote_by_probe(experiment: Experiment, examples: int = 3) -> Quote:
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
            display_progress=False,
        )
    measured = {role: found for role in ROLES if (found := meter.average(role))}
    _check_answered(traces, measured)
    rules, saved, count = config.collect, traces.saved, len(chosen)
    drafts = rules.drafts - saved["weak_calls"] / count
    answers = rules.answers * (rules.drafts + 1) - saved["strong_calls"] / count
    probe = Probe(count, drafts, answers, measured, counter.usage)
    sizes = {split: len(found) for split, found in splits.items()}
    made = tuple(_quote_stage(config, stage, probe) for stage in count_calls(config, sizes, probe))
    return Quote(made, config, sizes[config.evaluate.split], probe)


def _check_answered(traces: Traces, measured: dict[str, Measured]) -> None:
    missing = [role for role in ("weak", "strong") if role not in measured]
    errors = [trace.error for trace in traces if trace.error]
    if missing:
        why = f" The first failure: {errors[0]}." if errors else ""
        raise CollectionError(
            f"The {missing[0]} model gave no answer, so that there is nothing to reckon "
            f"with.{why} Try `cowest doctor`."
        )


def _quote_stage(config: Config, stage: StageCalls, probe: Probe | None) -> StageQuote:
    asked = {"weak": stage.drafts, "strong": stage.answers, "judge": stage.scored}
    if probe is None:
        ratings = config.influence.repeats if config.influence.judge else 0
        return StageQuote(
            stage.stage, {**asked, "judge": stage.scored.times(ratings)}, unknown=stage.unknown
        )
    calls = {role: number.times(probe.calls_per(role)) for role, number in asked.items()}
    if stage.unknown:
        return StageQuote(stage.stage, calls, unknown=stage.unknown)
    tokens, usd, minutes = NONE, NONE, NONE
    for role, found in probe.measured.items():
        settings = config.settings_of(role)
        each = found.input_tokens + found.output_tokens
        tokens += calls[role].times(each)
        known = found.usd is not None or not calls[role].most
        usd = usd + calls[role].times(found.usd or 0.0) if usd and known else None
        least, expected, most = (
            estimate_minutes(settings, count, found.seconds, each)
            for count in (calls[role].least, calls[role].expected, calls[role].most)
        )
        minutes += Range(least, expected, most)
    return StageQuote(stage.stage, calls, tokens, usd, minutes)


def estimate_minutes(settings: LMSettings, calls: float, seconds: float, tokens: float) -> float:
    """Minutes for so many calls of ``seconds`` and ``tokens`` each: as many at once as the table
    allows, and within the limits of an API."""
    minutes = calls * seconds / 60 / max(1.0, min(settings.concurrency, calls))
    if isinstance(settings, Api) and settings.requests_per_minute:
        minutes = max(minutes, calls / settings.requests_per_minute)
    if isinstance(settings, Api) and settings.tokens_per_minute:
        minutes = max(minutes, calls * tokens / settings.tokens_per_minute)
    return minutes


def _sum(ranges: Iterable[Range | None]) -> Range | None:
    """The sum; not known when a part is not."""
    total: Range | None = NONE
    for one in ranges:
        total = None if total is None or one is None else total + one
    return total


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
