"""The report of a run as it is now: from its store, and from its report.json where there is no
store to read. A run that is half done gives half a report."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ConfigError, ReportError, StoreError, nearest
from cowest_dspy.experiment.config import Config, load_config
from cowest_dspy.influence import Agreement, agreement
from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.report import NoiseFloor, format_kinds
from cowest_dspy.influence.trace import Trace, Traces
from cowest_dspy.optimizers.cycle import StepResult
from cowest_dspy.optimizers.rounds import Round, rows_file
from cowest_dspy.pairs import PreferencePairs
from cowest_dspy.report.facts import Arm, PairsSummary, Prompts, RunReport, Stage, training_curve
from cowest_dspy.report.numbers import describe_alike_drafts, influence_counts, mean_noise
from cowest_dspy.report.run_page import read_report
from cowest_dspy.report.runs import CONFIG, REPORT, STORE
from cowest_dspy.report.verdict import describe_rounds
from cowest_dspy.report.view import format_date
from cowest_dspy.store.store import Store

ARMS = (
    "weak", "strong", "strong_prompted", "collaboration_sft", "collaboration", "routed", "oracle",
    "shuffled", "sft_on_chosen", "more_sft", "by_correctness",
)  # fmt: skip
"""The arms of [evaluate], in the order of the table."""
MOST_PROMPTS = 1_000_000
"""Characters of all prompts in a report; a message that several have in common counts once."""
PACKAGES = ("cowest-dspy", "dspy", "transformers", "trl", "peft", "torch", "datasets", "pydantic")


def run_report(config: Config, store: Store) -> RunReport:
    """The report of what the run has so far. Asks no model."""
    # In memory, as the report's traces will be: each iteration reads the store. Without prompts,
    # which are long, and the same for all drafts of an example.
    traces = tuple(replace(trace, prompt=()) for trace in Traces.load(store))
    pairs = load_pairs(store)
    found = store.records("arm")
    order = {name: place for place, name in enumerate(ARMS)}
    report = RunReport(
        title=f"{config.name}: weak-strong collaboration",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=config.seed,
        reference="collaboration",
        rivals=("strong", "weak"),
        before="collaboration_sft",
        after="collaboration",
        arms=tuple(
            load_arm(name, found[name])
            for name in sorted(found, key=lambda name: order.get(name, len(order)))
        ),
        noise=_noise(traces, store),
        agreement=_agreement(traces),
        pairs=_pairs_summary(pairs, store),
        rounds=load_rounds(store),
        steps=load_steps(store),
        curves={
            name: training_curve(record["history"])
            for name, record in store.records("adapter").items()
        },
        stages=tuple(Stage(name, **cost) for name, cost in store.costs().items()),
        traces=traces,
        prompts=load_prompts(traces, store),
        config=config.model_dump(mode="json"),
        versions=package_versions(),
    )
    warnings = _warnings(report, config.strong.temperature, pairs, store.bill().killed_calls)
    return replace(report, warnings=tuple(warnings))


def load_prompts(traces: Sequence[Trace], store: Store) -> Prompts:
    """The prompts of these traces, of the first ones with ``MOST_PROMPTS`` characters."""
    places, requests, size = dict[tuple[str, str], int](), dict[str, tuple[int, ...]](), 0
    for key in dict.fromkeys(key for trace in traces for key in trace.requests.values()):
        asked = store.request_messages(key)
        if asked is None:
            continue
        found = [(message["role"], message["content"]) for message in asked]
        size += sum(len(text) for role, text in dict.fromkeys(found) if (role, text) not in places)
        if size > MOST_PROMPTS:
            break
        requests[key] = tuple(places.setdefault(message, len(places)) for message in found)
    messages = tuple({"role": role, "content": text} for role, text in places)
    return Prompts(messages, requests)


def load_rounds(store: Store) -> tuple[Round, ...]:
    """The rounds that a run has finished, in order."""
    return tuple(Round.from_dict(record) for record in store.records("round").values())


def load_steps(store: Store) -> tuple[StepResult, ...]:
    """The steps that a run's cycle has finished, in order; the first is the program it began
    with."""
    return tuple(StepResult.from_dict(record) for record in store.records("cycle").values())


def build_arm(name: str, config: Config, store: Store) -> Arm:
    """An arm of [evaluate] without its answers: its title names what answers, as far as it has been
    made, its note says what that is made of. Both are true of every domain; what they name comes
    from the configuration."""
    return Arm(name, arm_title(name, config, store), (), note=_note(name, config))


def arm_title(name: str, config: Config, store: Store) -> str:
    """The title of an arm of [evaluate]."""
    taught = config.sft is not None and config.sft.answers is not None
    tuner, rows = ("KTO", "drafts") if config.kto is not None else ("DPO", "pairs")
    return {
        "weak": "weak alone, fine-tuned to answer" if taught else "weak alone, as it came",
        "strong": "strong alone",
        "strong_prompted": "strong alone, with the prompts that the cycle found",
        "collaboration_sft": (
            f"collaboration, before {'the cycle' if config.cycle else 'preference tuning'}"
        ),
        "collaboration": add_state("collaboration", describe_tuning(store)),
        "routed": "collaboration, by the router",
        "oracle": "ceiling: strong with gold background",
        "shuffled": f"control: {tuner} on the same {rows}, labels shuffled",
        "sft_on_chosen": (
            "control: SFT on the "
            f"{'drafts that helped' if config.kto is not None else 'chosen drafts'}"
        ),
        "more_sft": "control: the same SFT, continued",
        "by_correctness": f"control: {tuner} on drafts ranked by their own answers",
    }[name]


def _note(name: str, config: Config) -> str:
    sft = config.sft
    learned = "nothing was fine-tuned for it"
    if sft and sft.answers:
        learned = f"fine-tuned on the rows of {_short(sft.drafts)}, then of {_short(sft.answers)}"
    return {
        "weak": learned,
        "strong": "the instructions, worked examples and room of refining, less the draft",
        "oracle": (
            f'given the field "{config.evaluate.oracle}" in the place of a draft: what '
            "perfect drafts would give"
        ),
    }.get(name, "")


def _short(reference: str) -> str:
    """A reference without the folders of its file: no path of a machine stands in a report or a
    bundle."""
    return reference.rpartition("/")[2]


def describe_tuning(store: Store) -> str:
    """Describe what all tuning of a run has come to: "after preference tuning", "untuned: round 1
    was rolled back", or the step of a cycle that was best."""
    if steps := load_steps(store):
        best = max((step for step in steps if step.best), key=lambda step: step.number)
        return (
            f"after step {best.number} of the cycle ({best.name})"
            if best.number
            else "untuned: no step of the cycle was better"
        )
    rounds = load_rounds(store)
    if rounds and not any(made.accepted for made in rounds):
        return f"untuned: {describe_rounds(rounds)}"
    return "after preference tuning"


def add_state(title: str, state: str) -> str:
    """A title with the state of its model after it.

    >>> add_state("collaboration", "after preference tuning")
    'collaboration, after preference tuning'
    >>> add_state("collaboration", "untuned: round 1 was rolled back")
    'collaboration (untuned: round 1 was rolled back)'
    """
    return f"{title} ({state})" if state.startswith("untuned") else f"{title}, {state}"


def load_arm(name: str, record: dict[str, Any]) -> Arm:
    """An arm from its record in the store."""
    return Arm(
        name,
        record["title"],
        tuple(Answer(**answer) for answer in record["answers"]),
        record["note"],
    )


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _warnings(
    report: RunReport, temperature: float | None, pairs: PreferencePairs | None, killed: str
) -> Iterator[str]:
    counts = influence_counts(report.traces)
    if counts.failed:
        yield (
            f"{counts.failed} of {counts.n} drafts failed ({format_kinds(counts.failures)}): they "
            "have no influence and are in no pair."
        )
    noise, span = mean_noise(report), counts.interval
    if report.traces and noise is None and temperature:
        yield (
            "The strong model samples, and how much its answers change by themselves was not "
            "measured: set [influence] noise, or [collect] answers above 1."
        )
    if noise is not None and span and span.low <= noise:
        yield (
            "The mean influence is not reliably more than noise: its interval begins at "
            f"{span.low:+.3f}, and the strong model's own sampling may make a mean of {noise:.3f}."
        )
    if killed:
        yield f"{killed}."
    if pairs and pairs.lengths and pairs.lengths.warning:
        yield pairs.lengths.warning
    if alike := describe_alike_drafts(report.arms):
        yield alike


def _noise(traces: Sequence[Trace], store: Store) -> NoiseFloor | None:
    """The noise floor that was measured, or the one in a collection with several answers."""
    stored = (store.record("noise", "floor") or {}).get("floor")
    return NoiseFloor(**stored) if stored else NoiseFloor.from_traces(traces)


def _agreement(traces: Sequence[Trace]) -> dict[str, Agreement]:
    """Each evaluator against the metric, on all answers that both have scored; an answer alone
    counts once."""
    answers: dict[tuple[str, str | None], dict[str, float]] = {}
    for trace in traces:
        answers[trace.example_id, trace.draft] = trace.refined_parts
        answers[trace.example_id, None] = trace.alone_parts
    both = [(example, scores) for (example, _), scores in answers.items() if "metric" in scores]
    found: dict[str, Agreement] = {}
    for name in sorted({name for _, scores in both for name in scores} - {"metric"}):
        rows = [(example, scores) for example, scores in both if name in scores]
        first, second = ([scores[one] for _, scores in rows] for one in ("metric", name))
        found[name] = agreement(first, second, [example for example, _ in rows])
    return found


def load_pairs(store: Store) -> PreferencePairs | None:
    """The run's pairs; empty when the filters let none through, None when they have not been
    made."""
    files = [
        rows_file(store.folder, "pairs", int(number)) for number in store.records("round") or ["1"]
    ]
    there = [path for path in files if path.is_file()]
    if not there:
        return None
    return PreferencePairs(
        tuple(pair for path in there if path.stat().st_size for pair in PreferencePairs.load(path))
    )


def _pairs_summary(pairs: PreferencePairs | None, store: Store) -> PairsSummary | None:
    if pairs is None:
        return None
    dropped: Counter[str] = Counter()
    for counts in store.records("pairs").values():
        dropped.update(counts)
    rows = tuple(replace(pair, prompt=pair.prompt[-1:]) for pair in pairs)
    return PairsSummary(len(pairs), pairs.examples, dict(dropped), rows)


def read_run(path: Path) -> RunReport:
    """The report of a run: ``path`` is its folder, or a report.json. Nothing is written into the
    folder's files of results.

    A run that another process works on is read from the report.json that it has written before; a
    warning in the report says so.

    Raises:
        ReportError: there is no such run, or what is there cannot be read; it names ``path`` and
            says what to type.
    """
    if not path.exists():
        other = nearest(str(path), (str(one) for one in path.parent.glob("*") if one.is_dir()))
        raise ReportError(
            f"There is no run at {path}.{other} Name the folders of runs, such as runs/handbook: "
            "`ls runs` shows yours."
        )
    if path.is_file():
        return read_report(path)
    if (path / STORE).is_file() and (path / CONFIG).is_file():
        return _from_store(path)
    if (path / REPORT).is_file():
        return read_report(path)
    raise ReportError(
        f"{path} is no run's folder: there is neither {STORE} with {CONFIG} nor {REPORT} in it. "
        f"`cowest cycle ... --run {path}` "
        "makes a run there."
    )


def _from_store(path: Path) -> RunReport:
    try:
        config = load_config([path / CONFIG])
    except ConfigError as error:
        raise ReportError(
            f"The run {path} cannot be read, its configuration is damaged: {error}"
        ) from error
    try:
        with Store(path) as store:
            return run_report(config, store)
    except StoreError as error:
        if "in use by another process" not in str(error) or not (path / REPORT).is_file():
            raise ReportError(f"The run {path} cannot be read: {error}") from error
    report = read_report(path)
    when = format_date(report.created)
    warning = f"The run is being worked on; this is what its report of {when} says."
    return replace(report, warnings=(*report.warnings, warning))
