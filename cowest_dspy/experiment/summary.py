"""The report of a run as it is now: from its store, and from its report.json where there is no
store to read. A run that is half done gives half a report."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ConfigError, ReportError, StoreError, nearest
from cowest_dspy.experiment.config import Config, load_config
from cowest_dspy.influence import agreement
from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.report import NoiseFloor, format_kinds
from cowest_dspy.influence.trace import Trace, Traces
from cowest_dspy.optimizers.cycle import StepResult
from cowest_dspy.optimizers.rounds import Round, rows_file
from cowest_dspy.pairs import Pair, PreferencePairs
from cowest_dspy.report import (
    AgreementRow,
    Arm,
    Curve,
    Noise,
    PairRow,
    PairsSummary,
    RoundRow,
    RunReport,
    Stage,
    StepRow,
    TraceRow,
    influence_counts,
    outcomes_text,
    read_report,
)
from cowest_dspy.report.numbers import alike_drafts
from cowest_dspy.store.store import Store

STORE, CONFIG, REPORT = "run.sqlite", "config.toml", "report.json"
ARMS = (
    "weak", "strong", "strong_prompted", "collaboration_sft", "collaboration", "routed", "oracle",
    "shuffled", "sft_on_chosen", "more_sft", "by_correctness",
)  # fmt: skip
"""The arms of [evaluate], in the order of the table."""
PACKAGES = ("cowest-dspy", "dspy", "transformers", "trl", "peft", "torch", "datasets", "pydantic")


def run_report(config: Config, store: Store) -> RunReport:
    """The report of what the run has so far. Asks no model."""
    # In memory, as the report's traces will be: each iteration reads the store.
    traces, pairs = list(kept_traces(store)), kept_pairs(store)
    noise = _noise(traces, store)
    found = store.records("arm")
    order = {name: place for place, name in enumerate(ARMS)}
    arms = tuple(
        arm_from(name, found[name])
        for name in sorted(found, key=lambda name: order.get(name, len(order)))
    )
    return RunReport(
        title=f"{config.name}: weak-strong collaboration",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=config.seed,
        reference="collaboration",
        rivals=("strong", "weak"),
        before="collaboration_sft",
        after="collaboration",
        arms=arms,
        noise=noise,
        agreement=_agreement(traces),
        pairs=_pairs_summary(pairs, store),
        rounds=tuple(
            _round_row(Round.from_dict(record)) for record in store.records("round").values()
        ),
        steps=tuple(
            _step_row(StepResult.from_dict(record)) for record in store.records("cycle").values()
        ),
        curves=tuple(
            Curve.from_trl(name, record["history"])
            for name, record in store.records("adapter").items()
        ),
        stages=tuple(Stage(name, **cost) for name, cost in store.costs().items()),
        traces=tuple(TraceRow.of(trace) for trace in traces),
        config=config.model_dump(mode="json"),
        versions=versions(),
        warnings=_warnings(config, traces, noise, pairs, arms, store.bill().killed_calls),
    )


def kept_traces(store: Store) -> Traces:
    """The traces of the run's last collection, in the order of examples and drafts; read when they
    are iterated over."""
    return Traces.load(store)


def arm_of(name: str, config: Config, store: Store) -> Arm:
    """An arm of [evaluate] without its answers: its title names what answers, as far as it has been
    made, its note says what that is made of. Both are true of every domain; what they name comes
    from the configuration."""
    return Arm(name, arm_title(name, config, store), (), note=_note(name, config))


def arm_title(name: str, config: Config, store: Store) -> str:
    """What an arm of [evaluate] is called."""
    taught = config.sft is not None and config.sft.answers is not None
    tuner, rows = ("KTO", "drafts") if config.kto is not None else ("DPO", "pairs")
    return {
        "weak": "weak alone, fine-tuned to answer" if taught else "weak alone, as it came",
        "strong": "strong alone",
        "strong_prompted": "strong alone, with the prompts that the cycle found",
        "collaboration_sft": (
            f"collaboration, before {'the cycle' if config.cycle else 'preference tuning'}"
        ),
        "collaboration": with_state("collaboration", tuned_state(store)),
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


def tuned_state(store: Store) -> str:
    """What all tuning of a run has come to: "after preference tuning", "untuned: round 1 was rolled
    back", or the step of a cycle that was best."""
    steps = [StepResult.from_dict(record) for record in store.records("cycle").values()]
    if steps:
        best = max((step for step in steps if step.best), key=lambda step: step.number)
        return (
            f"after step {best.number} of the cycle ({best.name})"
            if best.number
            else "untuned: no step of the cycle was better"
        )
    rounds = [Round.from_dict(record) for record in store.records("round").values()]
    if rounds and not any(made.accepted for made in rounds):
        return f"untuned: {outcomes_text(rounds)}"
    return "after preference tuning"


def with_state(title: str, state: str) -> str:
    """A title with the state of its model after it.

    >>> with_state("collaboration", "after preference tuning"), with_state("collaboration", "untuned: round 1 was rolled back")
    ('collaboration, after preference tuning', 'collaboration (untuned: round 1 was rolled back)')
    """
    return f"{title} ({state})" if state.startswith("untuned") else f"{title}, {state}"


def arm_from(name: str, record: dict[str, Any]) -> Arm:
    """An arm from its record in the store."""
    return Arm(
        name,
        record["title"],
        tuple(Answer(**answer) for answer in record["answers"]),
        record["note"],
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _warnings(
    config: Config,
    rows: Sequence[Trace],
    noise: Noise | None,
    pairs: PreferencePairs | None,
    arms: Sequence[Arm],
    killed: str,
) -> tuple[str, ...]:
    found: list[str] = []
    failed = sum(row.error is not None for row in rows)
    if failed:
        kinds = influence_counts(rows).failures
        found.append(
            f"{failed} of {len(rows)} drafts failed ({format_kinds(kinds)}): they have no "
            "influence and are in no pair."
        )
    if rows and noise is None and config.strong.temperature:
        found.append(
            "The strong model samples, and how much its answers change by themselves was not "
            "measured: set [influence] noise, or "
            "[collect] answers above 1."
        )
    span = influence_counts(rows).interval if noise else None
    if noise and span and span.low <= noise.of_mean:
        found.append(
            "The mean influence is not reliably more than noise: its interval begins at "
            f"{span.low:+.3f}, and the "
            f"strong model's own sampling may make a mean of {noise.of_mean:.3f}."
        )
    if killed:
        found.append(f"{killed}.")
    lengths = pairs.lengths if pairs else None
    return tuple(filter(None, (*found, lengths and lengths.warning, alike_drafts(arms))))


def _noise(traces: Sequence[Trace], store: Store) -> Noise | None:
    """What was measured for it; otherwise what a collection with several answers has in it."""
    kept = (store.record("noise", "floor") or {}).get("floor")
    floor = NoiseFloor(**kept) if kept else NoiseFloor.from_traces(traces)
    examples = len({trace.example_id for trace in traces if trace.influence is not None})
    if floor is None or not examples:
        return None
    answers = max((len(trace.alone_scores) for trace in traces), default=1) or 1
    return Noise(floor.n, floor.changed, floor.mean_change, floor.of_mean(examples, answers))


def _agreement(traces: Sequence[Trace]) -> tuple[AgreementRow, ...]:
    """Each evaluator against the metric, on all answers that both have scored; an answer alone
    counts once."""
    answers: dict[tuple[str, str | None], dict[str, float]] = {}
    for trace in traces:
        answers[trace.example_id, trace.draft] = trace.refined_parts
        answers[trace.example_id, None] = trace.alone_parts
    names = sorted(
        {
            name
            for parts in answers.values()
            if "metric" in parts
            for name in parts
            if name != "metric"
        }
    )
    rows: list[AgreementRow] = []
    for name in names:
        both = [
            (example, parts)
            for (example, _), parts in answers.items()
            if name in parts and "metric" in parts
        ]
        scores = [[parts[one] for _, parts in both] for one in ("metric", name)]
        found = agreement(scores[0], scores[1], [example for example, _ in both])
        span = found.interval
        rows.append(
            AgreementRow(
                name, found.n, found.tau, span.low if span else None, span.high if span else None
            )
        )
    return tuple(rows)


def kept_pairs(store: Store) -> PreferencePairs | None:
    """The run's pairs; empty when the gate let none through, None when they have not been made."""
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
    return PairsSummary(
        len(pairs),
        len({pair.example_id for pair in pairs}),
        dict(dropped),
        tuple(_pair_row(pair) for pair in pairs),
    )


def _round_row(made: Round) -> RoundRow:
    row = RoundRow(made.number, made.pairs, made.replayed, made.outcome, made.reason)
    found = made.gain
    return (
        replace(
            row,
            n=found.n,
            mean=found.mean,
            low=found.low,
            high=found.high,
            confidence=found.confidence,
        )
        if found
        else row
    )


def _step_row(made: StepResult) -> StepRow:
    row = StepRow(made.number, made.name, made.score, made.n, made.failed, made.best)
    return (
        replace(row, mean=made.gain.mean, low=made.gain.low, high=made.gain.high)
        if made.gain
        else row
    )


def _pair_row(pair: Pair) -> PairRow:
    prompt, chosen, rejected = (
        messages[-1]["content"] for messages in (pair.prompt, pair.chosen, pair.rejected)
    )
    return PairRow(
        pair.example_id,
        prompt,
        chosen,
        rejected,
        pair.chosen_influence,
        pair.rejected_influence,
        pair.round,
    )


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
    warning = f"The run is being worked on; this is what its report of {report.created} says."
    return replace(report, warnings=(*report.warnings, warning))
