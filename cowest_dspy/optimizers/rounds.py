"""The rounds of a run: each collects drafts of the model that the last one left, and is taken or
rolled back.

    collect on policy -> pairs -> tune from the current adapter, with it as the reference ->
    evaluate on the dev split -> decide

Every step is kept in the run's store under what it depends on: a run that was killed goes on where
it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

import dspy

from cowest_dspy.errors import TooFewPairs
from cowest_dspy.influence import arms
from cowest_dspy.influence.collection import collect, collect_again, with_failed_calls
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.trace import Sampling, Traces
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.optimizers.deciding import Gain, Scores, decide, gain
from cowest_dspy.optimizers.stages import Stages, digest
from cowest_dspy.optimizers.trained import TrainedModels
from cowest_dspy.pairs import (
    PreferencePairs,
    UnpairedPreferences,
    advice,
    at_least,
    preference_pairs,
    unpaired_preferences,
)
from cowest_dspy.pairs.config import LEAST_PAIRS
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.tuning import DPO, KTO, SFT
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
            (str(one.number), one.outcome, notebook.said(one.reason), *_numbers(one))
            for one in self
        ]
        accepted = sum(one.accepted for one in self)
        return notebook.view(
            f"{notebook.several(len(self), 'round')}, {accepted} accepted",
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


@dataclass(frozen=True)
class Task:
    """What rounds work on, and how.

    program: bound to its strong LM. metric: decides on held-out examples. evaluator: gives the
        scores that influence is made of. trainset, valset: examples with ids; none of valset may be
        among trainset. tuner: the settings of each round's tuning.
    gate: keyword arguments of ``preference_pairs``. least: fewer pairs are not trained on. most: no
        more pairs of a round are used. meaning: whatever else answers depend on (prompts, settings,
        code), for the identity of what is kept. given: pairs of the first round that were made
        elsewhere. collect: in the place of ``collect``, as it.
    """

    program: Collaboration
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    metric: Metric
    evaluator: Metric
    tuner: SFT | DPO | KTO
    sampling: Sampling
    gate: dict[str, Any] = field(default_factory=dict)
    least: int = LEAST_PAIRS
    most: int | None = None
    threads: int = 8
    weak_threads: int | None = None
    answers: int = 1
    max_errors: float = MAX_ERRORS
    meaning: str = ""
    given: str | None = None
    collect: Callable[..., Traces] = collect


class Rounds:
    """The rounds of a run.

    Args:
        stages: the run.
        models: trains weak models and finds them again.
        task: what is worked on.
        rules: how many rounds, and when one is taken.
        first: the number of the first one. What is kept of a round has its number in its name, so
            that the rounds of two steps of one run need different numbers.
    """

    def __init__(
        self,
        stages: Stages,
        models: TrainedModels,
        task: Callable[[], Task],
        rules: RoundRules,
        *,
        first: int = 1,
    ) -> None:
        self._stages, self._models, self._make_task, self._rules, self._first = (
            stages,
            models,
            task,
            rules,
            first,
        )

    @cached_property
    def task(self) -> Task:
        """What is worked on; made when it is needed first."""
        return self._make_task()

    def run(self, start: dspy.LM) -> tuple[dspy.LM, RoundHistory]:
        """The weak LM after all rounds, which is that of the last round that was taken (``start``
        if none was), and the rounds.

        Raises:
            TooFewPairs: round 1 gave too few pairs; a later one of which this is true is skipped.
                CollectionError, TuningError, BudgetError, StoreError: as their steps do; what was
                done is kept.
        """
        store, current, rolled_back = self._stages.store, start, 0
        done: list[Round] = []
        for number in range(self._first, self._first + self._rules.count):
            made, candidate = self._round(
                number, current, [one.number for one in done if one.accepted]
            )
            done.append(made)
            store.keep("round", str(number), asdict(made))
            self._stages.say(str(made))
            if made.accepted and candidate is not None:
                current, rolled_back = candidate, 0
                continue
            rolled_back += 1
            if rolled_back >= self._rules.patience or candidate is None:
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
        store = self._stages.store
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

    # Steps

    def collected(self, start: dspy.LM, number: int = 1, *, again: bool = False) -> Traces:
        """Drafts of the weak LM ``start`` for the train examples, and their influence. ``again``:
        the failed calls of a collection that is whole are made once more; otherwise it is only
        read, since what was tuned on it would no longer fit it."""
        task, store, name = self.task, self._stages.store, step_name("collect", number)
        program = task.program.bind(weak=start)
        margin = [task.sampling.margin] if task.sampling.adaptive else []
        identity = digest([task.meaning, number, program.weak.model, program.strong.model, *margin])
        examples, whole = (
            task.trainset,
            (store.record("done", name) or {}).get("identity") == identity,
        )
        if whole:
            failed = (
                with_failed_calls(Traces.load(store, round=number, types=program.output_types))
                if again
                else set()
            )
            examples = [example for example in examples if example.id in failed]
            if not examples:
                return Traces.load(store, round=number, types=program.output_types)
        title = f"Collecting drafts and their influence{_of_round(number)}"
        with self._stages.stage(name, title) as progress:
            about = (program, examples, task.evaluator, _of(task.sampling, number))
            threads = {"num_threads": task.threads, "weak_threads": task.weak_threads}
            options: dict[str, Any] = {
                "store": store,
                "answers": task.answers,
                "on_progress": progress,
                **threads,
            }
            traces = (
                collect_again(*about, **options)
                if whole
                else task.collect(*about, **options, max_errors=task.max_errors)
            )
        store.keep("done", name, {"identity": identity})
        return traces

    def paired(self, start: dspy.LM, number: int = 1) -> PreferencePairs:
        """The round's preference pairs, also written to its file in the run folder."""
        if self.task.given and number == self._first:
            names = names_hidden_in(self._stages.run)
            pairs = replace(
                PreferencePairs.load(self.task.given), hiding=Hiding(names) if names else None
            )
        else:
            pairs = preference_pairs(self.collected(start, number), **self.task.gate)
        pairs = pairs.at_most(self.task.most, seed=self.task.sampling.seed)
        pairs.save(self._file("pairs", number))
        self._stages.store.keep("pairs", step_name("dropped", number), pairs.dropped)
        return pairs

    def labelled(self, start: dspy.LM, number: int = 1) -> UnpairedPreferences:
        """The round's drafts as those that helped and those that hurt."""
        gate = {
            name: self.task.gate[name]
            for name in ("leak", "held_out", "run")
            if name in self.task.gate
        }
        return unpaired_preferences(self.collected(start, number), **gate)

    def enough(self, start: dspy.LM, number: int = 1) -> PreferencePairs:
        """The round's pairs.

        Raises:
            PairsError: there are fewer than ``least``.
        """
        return at_least(self.paired(start, number), self.task.least, tuned=number > 1)

    def rows(self, start: dspy.LM, number: int = 1) -> list[dict[str, Any]]:
        """What the round trains on: pairs, or with KTO labelled drafts, which are also written to
        their file in the run folder.

        Pairs that were made elsewhere are for KTO a desirable and an undesirable draft each.

        Raises:
            PairsError: there are fewer than ``least``, or with KTO only one label.
        """
        if not isinstance(self.task.tuner, KTO) or (self.task.given and number == self._first):
            rows = self.enough(start, number).rows(lineage=False)
            return unpaired(rows) if isinstance(self.task.tuner, KTO) else rows
        drafts = self.labelled(start, number)
        drafts.save(self._file("drafts", number))
        _check_labels(drafts, self.task.least)
        return _training_rows(drafts)

    def scores(self, lm: dspy.LM, number: int) -> Scores:
        """The score of every dev example when the weak model is ``lm``, of round ``number``; None
        where it failed."""
        task, store = self.task, self._stages.store
        program = task.program.bind(weak=lm)
        identity = digest(
            [
                task.meaning,
                program.weak.model,
                program.strong.model,
                [example.id for example in task.valset],
            ]
        )
        known = store.record("scores", lm.model) or {}
        if known.get("identity") != identity:
            with self._stages.stage(
                step_name("dev", number), f"Evaluating on the dev split{_of_round(number)}"
            ) as progress:
                answering = arms.collaboration_arm(program)
                made = arms.ask_all(
                    answering,
                    task.valset,
                    task.metric,
                    store=store,
                    num_threads=task.threads,
                    on_progress=progress,
                )
            known = {
                "identity": identity,
                "scores": {answer.example_id: answer.score for answer in made},
            }
            store.keep("scores", lm.model, known)
        return known["scores"]

    def _round(
        self, number: int, start: dspy.LM, earlier: list[int]
    ) -> tuple[Round, dspy.LM | None]:
        try:
            rows, replayed = self.rows(start, number), 0
        except TooFewPairs as few:
            if number == 1:
                raise
            return Round(number, start.model, None, few.found, 0, "skipped", few.shortage), None
        if self._rules.replay:
            old = [row for one in earlier for row in self.kept_rows(one)]
            rows, replayed = [*old, *rows], len(old)
        tuned = self.tuned(self._step(number), f"Preference tuning{_of_round(number)}", start, rows)
        about = (number, start.model, tuned.model, len(rows), replayed)
        if tuned.model == start.model:
            return Round(*about, "rolled back", "training left the weights as they were"), None
        if not self.task.valset:
            return Round(*about, "accepted", "there is no dev split, so it was not tested"), tuned
        before, after = self.scores(start, number), self.scores(tuned, number)
        for what, scores in (("before round", before), ("round", after)):
            self._stages.store.journal.scored(f"{what} {number}", list(scores.values()))
        found = gain(before, after, confidence=self._rules.confidence)
        made = decide(found, self._rules)
        return Round(
            *about, "accepted" if made.accepted else "rolled back", made.reason, found
        ), tuned

    def tuned(self, name: str, title: str, start: dspy.LM, rows: list[dict[str, Any]]) -> dspy.LM:
        """The weak LM tuned from ``start`` on rows of pairs or labelled drafts; with SFT as the
        tuner, on the chosen drafts."""
        tuner = self.task.tuner
        if isinstance(tuner, SFT):
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        return self._models.trained(name, title, start, lambda: rows, tuner)

    def _step(self, number: int) -> str:
        return step_name("kto" if isinstance(self.task.tuner, KTO) else "dpo", number)

    def kept_rows(self, number: int) -> list[dict[str, Any]]:
        """The rows that a round which is done has collected, read from the run folder; without
        those that it replayed."""
        if not isinstance(self.task.tuner, KTO):
            return PreferencePairs.load(self._file("pairs", number)).rows(lineage=False)
        if self.task.given and number == self._first:
            return unpaired(PreferencePairs.load(self._file("pairs", number)).rows(lineage=False))
        return _training_rows(UnpairedPreferences.load(self._file("drafts", number)))

    def _file(self, name: str, number: int) -> Path:
        return rows_file(self._stages.run, name, number)


def _training_rows(drafts: UnpairedPreferences) -> list[dict[str, Any]]:
    """Without lineage, which training does not depend on."""
    return [{key: row[key] for key in ("prompt", "completion", "label")} for row in drafts.rows()]


def unpaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
    counted = notebook.several(len(drafts), "labelled draft")
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


def _of(sampling: Sampling, number: int) -> Sampling:

    return replace(sampling, round=number)
