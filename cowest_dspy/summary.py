"""What a run's store holds, as the report's facts. A run that is half done gives half a report."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cowest_dspy.config import Config
from cowest_dspy.pairs import Pair, PreferencePairs
from cowest_dspy.report import Answer, Arm, Curve, InfluenceRow, PairRow, PairsSummary, RunReport, Stage, TraceRow
from cowest_dspy.store import Store
from cowest_dspy.traces import StoredTraces, Trace

TITLES = {
    "weak": "weak alone, fine-tuned to answer",
    "strong": "strong alone",
    "collaboration_sft": "collaboration, before preference tuning",
    "collaboration": "collaboration, after preference tuning",
    "oracle": "ceiling: strong with the oracle's facts",
    "shuffled": "control: DPO on the same pairs, labels shuffled",
    "sft_on_chosen": "control: SFT on the chosen drafts",
    "more_sft": "control: the same SFT, continued",
}
NOTES = {
    "weak": "it learned the same handbook, and the answers of the training questions",
    "strong": "the instructions, worked examples and room of refining, less the draft",
    "oracle": "what perfect drafts would give",
}
PACKAGES = ("cowest-dspy", "dspy", "transformers", "trl", "peft", "torch", "datasets", "pydantic")


def run_report(config: Config, store: Store) -> RunReport:
    """The report of what the run has so far. Asks no model."""
    # In memory, as the report's rows will be: iterating over what is kept reads it from the disk each time.
    traces, pairs = list(kept_traces(store)), _pairs(store)
    found = store.records("arm")
    order = {name: place for place, name in enumerate(TITLES)}
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    return RunReport(
        title=f"{config.name}: weak-strong collaboration",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=config.seed,
        reference="collaboration",
        rivals=("strong", "weak"),
        before="collaboration_sft",
        after="collaboration",
        arms=tuple(arm_from(name, found[name]) for name in names),
        influence=tuple(_influence_row(trace) for trace in traces),
        pairs=_pairs_summary(pairs, store),
        curves=tuple(Curve.from_trl(name, record["history"]) for name, record in store.records("adapter").items()),
        stages=tuple(Stage(name, **value) for name, value in store.records("stage").items()),
        traces=tuple(TraceRow.of(trace) for trace in traces),
        config=config.model_dump(mode="json"),
        versions=versions(),
        warnings=_warnings(traces, pairs),
    )


def kept_traces(store: Store) -> StoredTraces:
    """The traces of the run's last collection, in the order of examples and drafts; read when they are iterated over."""
    return StoredTraces(store)


def arm_from(name: str, record: dict[str, Any]) -> Arm:
    """An arm from its record in the store."""
    return Arm(name, record["title"], tuple(Answer(**answer) for answer in record["answers"]), record["note"])


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _warnings(traces: Sequence[Trace], pairs: PreferencePairs | None) -> tuple[str, ...]:
    failed = sum(trace.error is not None for trace in traces)
    failures = [f"{failed} of {len(traces)} drafts failed: they have no influence and are in no pair."] if failed else []
    lengths = pairs.lengths if pairs else None
    return (*failures, *([lengths.warning] if lengths and lengths.warning else []))


def _pairs(store: Store) -> PreferencePairs | None:
    """The run's pairs; empty when the gate let none through, None when they have not been made."""
    path = store.folder / "pairs.jsonl"
    if not path.is_file():
        return None
    return PreferencePairs.load(path) if path.stat().st_size else PreferencePairs(())


def _pairs_summary(pairs: PreferencePairs | None, store: Store) -> PairsSummary | None:
    if pairs is None:
        return None
    dropped = store.record("pairs", "dropped") or {}
    return PairsSummary(len(pairs), len({pair.example_id for pair in pairs}), dropped, tuple(_pair_row(pair) for pair in pairs))


def _influence_row(trace: Trace) -> InfluenceRow:
    return InfluenceRow(trace.example_id, trace.draft_index, trace.influence, trace.error, trace.draft_score, trace.round)


def _pair_row(pair: Pair) -> PairRow:
    prompt, chosen, rejected = (messages[-1]["content"] for messages in (pair.prompt, pair.chosen, pair.rejected))
    return PairRow(pair.example_id, prompt, chosen, rejected, pair.chosen_influence, pair.rejected_influence, pair.round)
