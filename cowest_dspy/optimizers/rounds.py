"""The rounds of a run: each collects drafts of the model that the last one left, and is taken or
rolled back.

    collect on policy -> pairs -> tune from the current adapter, with it as the reference ->
    evaluate on the dev split -> decide

Every step is kept in the run's store under what it depends on: a run that was killed goes on where
it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import dspy

from cowest_dspy.errors import TooFewPairs
from cowest_dspy.influence import arms
from cowest_dspy.influence.collection import collect, collect_again, with_failed_calls
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.trace import Sampling, Trace, Traces
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.optimizers.deciding import Gain, Scores, decide, gain
from cowest_dspy.optimizers.run import RunContext, Settings
from cowest_dspy.optimizers.trained import TrainedModels
from cowest_dspy.pairs import (
    PreferencePairs,
    UnpairedPreferences,
    advice,
    at_least,
    preference_pairs,
    unpaired_preferences,
)
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.tuning import KTO, SFT
from cowest_dspy.utils import notebook
from cowest_dspy.utils.hiding import Hiding, names_hidden_in

Outcome = Literal["accepted", "rolled back", "skipped"]
"""What became of a round: its tuned model was taken, its tuned model was not taken, or nothing was
tuned."""


@dataclass(frozen=True)
class Round:
    """What one round did. ``start`` and ``model`` are the ids of the weak model before and after
    tuning; ``model`` is None where nothing was tuned. ``pairs`` counts the rows of training (with
    KTO: labelled drafts), or those that were too few for it; ``replayed`` of them are of earlier
    rounds. ``reason`` says why it was accepted, rolled back or skipped."""

    number: int
    start: str
    model: str | None
    pairs: int
    replayed: int
    outcome: Outcome
    reason: str
    gain: Gain | None = None

    @property
    def accepted(self) -> bool:
        """Whether the next round, or the result, goes on from its model."""
        return self.outcome == "accepted"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Round:
        """The inverse of ``dataclasses.asdict``."""
        made = {**values, "gain": Gain(**values["gain"]) if values["gain"] else None}
        if "accepted" in made:  # a run's record from before outcomes had names
            accepted = made.pop("accepted")
            made["outcome"] = (
                "accepted" if accepted else "rolled back" if made["model"] else "skipped"
            )
        return cls(**made)

    def __str__(self) -> str:
        return f"round {self.number} {self.outcome}: {self.reason}"


class RoundHistory(tuple[Round, ...]):
    """Rounds in order: a tuple, which a notebook shows as a table."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no rounds"

    def _repr_html_(self) -> str:
        """One row for each round: what it was tuned on, what it gained on the dev split, its
        outcome, and why."""
        heads = ("round", "outcome", "why", "pairs", "replayed", "n", "gain")
        rows = [
            (str(one.number), one.outcome, notebook.format_text(one.reason), *_numbers(one))
            for one in self
        ]
        accepted = sum(one.accepted for one in self)
        return notebook.view(
            f"{notebook.format_plural(len(self), 'round')}, {accepted} accepted",
            notebook.table(heads, rows, texts=3, most=20) if rows else None,
        )


def _numbers(one: Round) -> tuple[str, str, str, str]:
    found = one.gain
    return (
        f"{one.pairs:,}",
        f"{one.replayed:,}",
        f"{found.n:,}" if found else "-",
        found.span if found else "-",
    )


@dataclass(kw_only=True)
class Rounds:
    """The rounds of a run, and their single stages.

    Args:
        run: where they are recorded.
        models: trains weak models and finds them again.
        program: bound to its strong LM.
        trainset, valset: examples with ids; none of valset may be among trainset.
        metric: decides on held-out examples.
        evaluator: gives the scores that influence is made of.
        tuner: the settings of each round's training.
        sampling: of drafts.
        pairs: which drafts become pairs, and how many are enough; ``pairs.source`` are pairs of the
            first round that were made elsewhere.
        rules: how many rounds, and when one is taken.
        num_threads, weak_threads, answers, max_errors: as for :func:`collect`.
        held_out: examples that must be in no pair, besides those of valset.
        lineage: the run's name in its pairs.
        depends_on: whatever else answers depend on (prompts, settings, code), for the identity of
            what is recorded.
        collecting: in the place of ``collect``, as it.
        first: the number of the first round. What is recorded of a round has its number in its
            name, so that the rounds of two steps of one run need different numbers.
    """

    run: RunContext
    models: TrainedModels
    program: Collaboration
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    metric: Metric
    evaluator: Metric
    tuner: Settings
    sampling: Sampling
    pairs: PairRules
    rules: RoundRules
    num_threads: int = 8
    weak_threads: int | None = None
    answers: int = 1
    max_errors: float = MAX_ERRORS
    held_out: Sequence[dspy.Example] = ()
    lineage: str = ""
    depends_on: str = ""
    collecting: Callable[..., Traces] = collect
    first: int = 1

    def run_all(self, start: dspy.LM) -> tuple[dspy.LM, RoundHistory]:
        """The weak LM after all rounds, which is that of the last round that was taken (``start``
        if none was), and the rounds.

        Raises:
            TooFewPairs: round 1 gave too few pairs; a later one of which this is true is skipped.
                CollectionError, TuningError, BudgetError, StoreError: as their steps do; what was
                done is kept.
        """
        store, current, rolled_back = self.run.store, start, 0
        done: list[Round] = []
        for number in range(self.first, self.first + self.rules.count):
            made, candidate = self._round(
                number, current, [one.number for one in done if one.accepted]
            )
            done.append(made)
            store.keep("round", str(number), asdict(made))
            self.run.say(str(made))
            if made.accepted and candidate is not None:
                current, rolled_back = candidate, 0
                continue
            rolled_back += 1
            if rolled_back >= self.rules.patience or candidate is None:
                break
        self._forget_after(done[-1].number)
        taken = next((one for one in reversed(done) if one.accepted), None)
        store.keep(
            "final",
            "weak",
            {"adapter": self._step(taken.number) if taken else None, "model": current.model},
        )
        return current, RoundHistory(done)

    def _forget_after(self, number: int) -> None:
        """Drops what an earlier configuration left of later rounds, so that it is in no table."""
        store = self.run.store
        for later in count(number + 1):
            found = store.record("done", step_name("collect", later)) or store.record(
                "round", str(later)
            )
            if not found and not store.count("trace", start=f"{later}/"):
                return
            store.forget("trace", start=f"{later}/")
            for kind, key in (
                ("round", str(later)),
                ("saved", str(later)),
                ("done", step_name("collect", later)),
            ):
                store.forget(kind, start=key)

    # The stages of a round

    def collect(self, start: dspy.LM, number: int = 1, *, again: bool = False) -> Traces:
        """Drafts of the weak LM ``start`` for the train examples, and their influence. ``again``:
        the failed calls of a collection that is whole are made once more; otherwise it is only
        read, since what was tuned on it would no longer fit it."""
        store, name, program = self.run.store, step_name("collect", number), self._bind(start)
        title = f"Collecting drafts and their influence{_of_round(number)}"
        about = (self.evaluator, replace(self.sampling, round=number))
        options: dict[str, Any] = {
            "store": store,
            "num_threads": self.num_threads,
            "weak_threads": self.weak_threads,
            "answers": self.answers,
        }

        def make() -> dict[str, Any]:
            nonlocal again
            again = False
            with self.run.stage(name, title) as progress:
                self.collecting(
                    program,
                    self.trainset,
                    *about,
                    **options,
                    max_errors=self.max_errors,
                    on_progress=progress,
                )
            return {}

        margin = [self.sampling.margin] if self.sampling.adaptive else []
        models = [program.weak.model, program.strong.model]
        store.step("done", name, [self.depends_on, number, *models, *margin], make)
        traces = Traces.load(store, round=number, types=program.output_types)
        failed = with_failed_calls(traces) if again else set()
        examples = [example for example in self.trainset if example.id in failed]
        if examples:
            with self.run.stage(name, title) as progress:
                return collect_again(program, examples, *about, **options, on_progress=progress)
        return traces

    def pair(self, start: dspy.LM, number: int = 1) -> PreferencePairs:
        """The round's preference pairs, also written to its file in the run folder."""
        if self._given(number):
            names = names_hidden_in(self.run.folder)
            pairs = replace(
                PreferencePairs.load(str(self.pairs.source)),
                hiding=Hiding(names) if names else None,
            )
        else:
            pairs = preference_pairs(self.collect(start, number), **self.pairing)
        pairs = pairs.at_most(self.pairs.most, seed=self.sampling.seed)
        pairs.save(self._file("pairs", number))
        self.run.store.keep("pairs", step_name("dropped", number), pairs.dropped)
        return pairs

    @property
    def pairing(self) -> dict[str, Any]:
        """The arguments of ``preference_pairs``."""
        rules = self.pairs.model_dump(exclude={"least", "most", "source"})
        return {**rules, "held_out": [*self.valset, *self.held_out], "run": self.lineage}

    def unpaired(self, start: dspy.LM, number: int = 1) -> UnpairedPreferences:
        """The round's drafts as those that helped and those that hurt."""
        rules = {name: self.pairing[name] for name in ("leak", "held_out", "run")}
        return unpaired_preferences(self.collect(start, number), **rules)

    def rows(self, start: dspy.LM, number: int = 1) -> list[dict[str, Any]]:
        """What the round trains on: pairs, or with KTO labelled drafts, which are also written to
        their file in the run folder.

        Pairs that were made elsewhere are for KTO a desirable and an undesirable draft each.

        Raises:
            PairsError: there are fewer than ``least``, or with KTO only one label.
        """
        if not isinstance(self.tuner, KTO) or self._given(number):
            pairs = at_least(self.pair(start, number), self.pairs.least, tuned=number > 1)
            return self._as_rows(pairs)
        drafts = self.unpaired(start, number)
        drafts.save(self._file("drafts", number))
        _check_labels(drafts, self.pairs.least)
        return _training_rows(drafts)

    def rows_of(self, traces: Iterable[Trace]) -> list[dict[str, Any]]:
        """What a round would train on by pairs of these traces; nothing is written.

        Raises:
            PairsError: there are fewer than ``least``.
        """
        pairs = preference_pairs(traces, **self.pairing)
        pairs = pairs.at_most(self.pairs.most, seed=self.sampling.seed)
        return self._as_rows(at_least(pairs, self.pairs.least))

    def saved_rows(self, number: int) -> list[dict[str, Any]]:
        """The rows that a round which is done has collected, read from the run folder; without
        those that it replayed."""
        if not isinstance(self.tuner, KTO) or self._given(number):
            return self._as_rows(PreferencePairs.load(self._file("pairs", number)))
        return _training_rows(UnpairedPreferences.load(self._file("drafts", number)))

    def tune(self, name: str, title: str, start: dspy.LM, rows: list[dict[str, Any]]) -> dspy.LM:
        """The weak LM tuned from ``start`` on rows of pairs or labelled drafts; with SFT as the
        tuner, on the chosen drafts."""
        if isinstance(self.tuner, SFT):
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        return self.models.train(name, title, start, rows, self.tuner)

    def scores(self, lm: dspy.LM, number: int) -> Scores:
        """The score of every dev example when the weak model is ``lm``, of round ``number``; None
        where it failed."""
        program, title = self._bind(lm), f"Evaluating on the dev split{_of_round(number)}"

        def make() -> dict[str, Any]:
            with self.run.stage(step_name("dev", number), title) as progress:
                answers = arms.ask_all(
                    arms.collaboration_arm(program),
                    self.valset,
                    self.metric,
                    store=self.run.store,
                    num_threads=self.num_threads,
                    on_progress=progress,
                )
            return {"scores": {answer.example_id: answer.score for answer in answers}}

        models = [program.weak.model, program.strong.model]
        asked = [example.id for example in self.valset]
        step = self.run.store.step("scores", lm.model, [self.depends_on, *models, asked], make)
        return step["scores"]

    def _round(
        self, number: int, start: dspy.LM, earlier: list[int]
    ) -> tuple[Round, dspy.LM | None]:
        try:
            rows, replayed = self.rows(start, number), 0
        except TooFewPairs as few:
            if number == 1:
                raise
            return Round(number, start.model, None, few.found, 0, "skipped", few.shortage), None
        if self.rules.replay:
            old = [row for one in earlier for row in self.saved_rows(one)]
            rows, replayed = [*old, *rows], len(old)
        tuned = self.tune(self._step(number), f"Preference tuning{_of_round(number)}", start, rows)
        about = (number, start.model, tuned.model, len(rows), replayed)
        if tuned.model == start.model:
            return Round(*about, "rolled back", "training left the weights as they were"), None
        if not self.valset:
            return Round(*about, "accepted", "there is no dev split, so it was not tested"), tuned
        before, after = self.scores(start, number), self.scores(tuned, number)
        for what, scores in (("before round", before), ("round", after)):
            self.run.store.journal.scored(f"{what} {number}", list(scores.values()))
        found = gain(before, after, confidence=self.rules.confidence)
        made = decide(found, self.rules)
        return Round(
            *about, "accepted" if made.accepted else "rolled back", made.reason, found
        ), tuned

    def _bind(self, weak: dspy.LM) -> Collaboration:
        return self.program.bind(weak=weak)

    def _given(self, number: int) -> bool:
        """Whether the pairs of a round were made elsewhere."""
        return self.pairs.source is not None and number == self.first

    def _as_rows(self, pairs: PreferencePairs) -> list[dict[str, Any]]:
        rows = pairs.rows(lineage=False)
        return unpaired_rows(rows) if isinstance(self.tuner, KTO) else rows

    def _step(self, number: int) -> str:
        return step_name("kto" if isinstance(self.tuner, KTO) else "dpo", number)

    def _file(self, name: str, number: int) -> Path:
        return rows_file(self.run.folder, name, number)


def _training_rows(drafts: UnpairedPreferences) -> list[dict[str, Any]]:
    """Without lineage, which training does not depend on."""
    return [{key: row[key] for key in ("prompt", "completion", "label")} for row in drafts.rows()]


def unpaired_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of pairs as labelled rows, two of each: for KTO."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in rows
        for side, label in sides
    ]


def _check_labels(drafts: UnpairedPreferences, least: int) -> None:
    hurt = len(drafts) - drafts.helped
    reasons = "".join(f", {count} {reason}" for reason, count in drafts.dropped.items())
    found = f"{drafts.helped} drafts helped and {hurt} hurt{reasons}."
    more = "Sample more drafts ([collect] drafts), at a higher temperature, or on more examples"
    counted = notebook.format_plural(len(drafts), "labelled draft")
    if len(drafts) < least:
        text = (
            f"Too few labelled drafts for KTO: {found} {advice(drafts.dropped, f'{more}.')} "
            f"[pairs] least asks for {least}."
        )
        raise TooFewPairs(text, len(drafts), f"{counted}, {least} needed")
    if not drafts.helped or not hurt:
        instead = (
            "; or tune with SFT, or with DPO if some helped more than others."
            if drafts.helped
            else "."
        )
        text = (
            f"KTO needs drafts that helped and drafts that hurt: {found} "
            f"{advice(drafts.dropped, more + instead)}"
        )
        raise TooFewPairs(
            text,
            len(drafts),
            f"of {counted} {drafts.helped} helped and {hurt} hurt, KTO needs both",
        )


def rows_file(run: Path, name: str, number: int) -> Path:
    """Where a run keeps the rows of a round, ``name`` being "pairs" or "drafts"."""
    return run / f"{step_name(name, number).replace(' ', '-')}.jsonl"


def step_name(name: str, number: int) -> str:
    """The name of a round's step: the first round's is the plain name."""
    return name if number == 1 else f"{name} {number}"


def _of_round(number: int) -> str:
    return "" if number == 1 else f", round {number}"
