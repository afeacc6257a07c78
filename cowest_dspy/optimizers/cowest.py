"""CoWest as a DSPy optimiser: rounds of collecting, pairing, tuning and deciding, in one
``compile``.

    optimizer = CoWest(metric=answer_match, tuner=DPO(beta=0.1), drafts=4, rounds=2)
    better = optimizer.compile(program, trainset=train, valset=dev)
    better.rounds[0].reason      # "gain +0.100 [+0.025, +0.175] on 40 examples (4 better, 0 worse):
                                 ..."

It plugs into ``dspy.BetterTogether`` as any weight optimiser: ``BetterTogether(metric=m,
p=dspy.GEPA(...), w=CoWest(...))``.

A round:

    collect on policy -> pairs -> tune from the current adapter, with it as the reference ->
    evaluate on the dev split -> decide

Every step is kept in the run's store under what it depends on: a run that was killed goes on where
it stood.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dspy
from dspy.teleprompt import Teleprompter

from cowest_dspy.errors import ProgramError, TooFewPairs
from cowest_dspy.influence import arms
from cowest_dspy.influence.collection import collect, collect_again, with_failed_calls
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.judge import Rubric
from cowest_dspy.influence.metric import Metric, metric_name
from cowest_dspy.influence.trace import Sampling, Trace, Traces
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.optimizers.rounds import (
    Round,
    RoundHistory,
    Scores,
    decide,
    gain,
    rows_file,
    step_name,
)
from cowest_dspy.optimizers.run import (
    NoProgress,
    ProgressBars,
    RunContext,
    TrainedModels,
    store_in_use,
)
from cowest_dspy.pairs import (
    PreferencePairs,
    UnpairedPreferences,
    preference_pairs,
    unpaired_preferences,
)
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.program.collaboration import Collaboration, prompt_adapter
from cowest_dspy.program.embedded import Embedded, as_collaboration, tune_inside
from cowest_dspy.program.examples import Examples, fields_of, inputs_key, prepare_examples
from cowest_dspy.store.record import unrecorded
from cowest_dspy.store.serialize import digest
from cowest_dspy.store.store import Store
from cowest_dspy.tuning import DPO, KTO, SFT, TRLProvider, check_processes, tunable
from cowest_dspy.utils.hiding import Hiding, names_hidden_in
from cowest_dspy.utils.settings import read_settings

if TYPE_CHECKING:
    from transformers import TrainerCallback

PLAIN = (str, int, float, tuple, Rubric)
HELD_OUT = 0.2
"""The part of the trainset that decides, when there is no valset."""

logger = logging.getLogger(__name__)


class TunedCollaboration(Collaboration):
    """For types: a Collaboration that :meth:`CoWest.compile` made. ``rounds`` is their history,
    ``log_dir`` the folder."""

    rounds: RoundHistory
    log_dir: Path


class CoWest(Teleprompter):
    """Tunes a Collaboration's weak model towards drafts that help its strong model.

    Args:
        metric: any DSPy metric with values in [0, 1]; it decides on the valset whether a round is
            taken.
        tuner: settings of each round's training: ``DPO`` on preference pairs, ``SFT`` on their
            chosen drafts, or ``KTO`` on all drafts that helped or hurt, as such. A dictionary is
            of DPO's fields.
        drafts: drafts sampled for each example.
        rounds: how many rounds, at most; or ``RoundRules``, or a dictionary of them, with the
            thresholds of taking one.
        evaluator: what influence is made of, where it is not ``metric``: a Judge, a GoldLikelihood,
            several Weighted.
        sampling: temperature, top_p, seed, adaptive sampling; overrides ``drafts``. Of a dictionary
            what it does not name is as ``drafts`` and ``seed`` say.
        pairs: ``PairRules``, or a dictionary of them: margin, strategy, least, ...
        answers: how often a strong model that samples is asked; the scores are averaged.
        max_errors: the largest share of drafts that may fail, in [0, 1].
        num_threads: questions to the strong model under way at once. weak_threads: drafts under
            way at once.
        seed: of sampling and training.
        processes: that train together, one for each GPU, or on the CPU where there is none; or a
            file of Accelerate's (tuning.md).
        trainer_callbacks: ``transformers.TrainerCallback`` instances for every training. They are
            no part of what a round depends on.
        log_dir: the folder of store and adapters, for resuming; by default a new temporary folder,
            which is kept. Inside ``keeping(store)``, as in a Cycle, it is that store's.
        progress: shows it, for instance ``cowest_dspy.cli.progress.Progress()``.
        display_progress: where there is no ``progress``, whether to show each stage as a bar, as
            ``dspy.Evaluate`` does. None: in a terminal and in a notebook.

    The student's weak LM must be one that can be tuned: an in-process model, or a server that takes
    adapters.

    Raises:
        ConfigError: a dictionary of settings with an unknown key or a value that cannot be.
        TuningError: a tuner that so many processes cannot train by.
    """

    def __init__(
        self,
        metric: Metric,
        tuner: DPO | KTO | SFT | Mapping[str, Any] | None = None,
        drafts: int = 4,
        rounds: int | RoundRules | Mapping[str, Any] = 1,
        *,
        evaluator: Metric | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        pairs: PairRules | Mapping[str, Any] | None = None,
        answers: int = 1,
        max_errors: float = MAX_ERRORS,
        num_threads: int = 8,
        weak_threads: int | None = None,
        seed: int = 0,
        processes: int | str | Path = 1,
        trainer_callbacks: Sequence[TrainerCallback] = (),
        log_dir: str | Path | None = None,
        progress: NoProgress | None = None,
        display_progress: bool | None = None,
    ) -> None:
        self.metric, self.evaluator = metric, evaluator or metric
        self.tuner = tuner if isinstance(tuner, KTO | SFT) else read_settings(tuner, DPO, "tuner")
        if not isinstance(sampling, Sampling):
            sampling = {"drafts": drafts, "seed": seed, **(sampling or {})}
        self.sampling = read_settings(sampling, Sampling, "sampling")
        self.rules = read_settings(
            {"count": rounds} if isinstance(rounds, int) else rounds, RoundRules, "rounds"
        )
        self.pairs = read_settings(pairs, PairRules, "pairs")
        self.answers, self.max_errors, self.num_threads, self.weak_threads = (
            answers,
            max_errors,
            num_threads,
            weak_threads,
        )
        self.seed, self.processes, self.log_dir = seed, processes, log_dir
        self.progress, self.display_progress = progress, display_progress
        # Not "callbacks": DSPy calls those of that name when an optimiser compiles.
        self.trainer_callbacks = tuple(trainer_callbacks)
        if processes != 1:
            # Now, and not when all drafts are collected.
            check_processes(self.tuner, processes, trainer_callbacks)

    def __repr__(self) -> str:
        about = (
            f"tuner={self.tuner!r}, drafts={self.sampling.drafts}, rounds={self.rules.count}, "
            f"seed={self.seed}"
        )
        return f"CoWest(metric={metric_name(self.metric)}, {about})"

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        student: dspy.Module,
        *,
        trainset: Examples,
        teacher: dspy.Module | None = None,
        valset: Examples | None = None,
        first_round: int = 1,
    ) -> TunedCollaboration:
        """A copy of ``student`` with the weak model of the last round that was taken; the student
        stays as it is.

        The student is a bound Collaboration, or a module of your own that has one in it and calls
        it once for each example. Of such a module, influence is measured on what it returns: with
        the draft, against the module with the strong model alone in the Collaboration's place.

        Only the weak model is trained, on its own completions. With ``tuner=SFT(...)`` it can learn
        from a ``teacher`` instead: a bound program of the same prompts whose weak model is another,
        such as ``program.bind(weak="openai/gpt-4.1-mini")``. That model drafts in the student's
        place, and the student's weak model is fine-tuned on those of its drafts that influence
        chose. Preference tuning takes no teacher: it is about what the model itself writes.

        Trainset and valset are examples, dictionaries or a ``datasets.Dataset``, as ``collect``
        takes them. Without a valset, the last fifth of the trainset decides, and an earlier example
        that has the inputs of one of those is left out. Calls, traces and adapters are kept in
        ``log_dir``: the same call goes on there where it was interrupted. ``first_round`` is the
        number of the first round, and in the names of what is kept: a Cycle counts on from the
        rounds of the steps before.

        Raises:
            ProgramError: the student is no bound Collaboration, and has not one in it; a teacher
                for another tuner than SFT, or of other prompts.
            DataError: an example that lacks an input of the program.
            TuningError: a weak LM that cannot be tuned, or a training that must not go on.
            PairsError: the first round gave fewer pairs (with KTO: labelled drafts) than
                ``pairs.least``, or with KTO only drafts that helped, or only drafts that hurt.
        """
        program = as_collaboration(student)
        _ = program.weak, program.strong
        drafting = None if teacher is None else self._drafter(program, teacher)
        train = list(prepare_examples(trainset, program))
        if valset is None:
            train, held = _hold_out(train)
        else:
            held = list(prepare_examples(valset, program))
        weak = unrecorded(program.weak)
        start = weak if isinstance(weak.provider, TRLProvider) else tunable(weak)
        with store_in_use(self.log_dir, strong=program.strong.model) as store:
            run = RunContext(store, self._progress(store))
            logger.info("CoWest works in %s", run.folder)
            models = TrainedModels(
                run,
                start,
                self.seed,
                processes=self.processes,
                callbacks=self.trainer_callbacks,
            )
            rounds = Rounds(
                self, run, models, program, train, held, first=first_round, drafting=drafting
            )
            lm, history = rounds.run_all(start)
        made = cast(
            "TunedCollaboration",
            student.deepcopy()
            if lm is start
            else student.bind(weak=lm)
            if isinstance(student, Collaboration)
            else tune_inside(student, lm),
        )
        made.rounds, made.log_dir, made._compiled = history, run.folder, True
        return made

    def _drafter(self, program: Collaboration, teacher: dspy.Module) -> dspy.LM:
        """The weak LM of a teacher."""
        if not isinstance(self.tuner, SFT):
            raise ProgramError(
                f"CoWest takes a teacher with tuner=SFT(...), which learns from its drafts; "
                f"{type(self.tuner).__name__} learns from drafts of the model that is tuned."
            )
        taught = as_collaboration(teacher)
        if _draft_prompts(taught) != _draft_prompts(program):
            raise ProgramError(
                "The teacher drafts with other instructions, fields or demos than the student: "
                'give the same program on another weak model, program.bind(weak="openai/...").'
            )
        return taught.weak

    def _progress(self, store: Store) -> NoProgress:
        """What shows the run: what was given; otherwise bars, unless who opened the store shows it
        already, as a Cycle does."""
        if self.progress is not None:
            return self.progress
        return NoProgress() if store.journal.watched else ProgressBars(self.display_progress)

    def meaning(self, student: Collaboration, train: Sequence[dspy.Example]) -> str:
        """The digest of what answers depend on besides the models: program, examples, settings."""
        whole = isinstance(student, Embedded)
        return digest(
            [
                student.dump_state(),
                type(prompt_adapter(student.adapter)).__name__,
                vars(self.sampling),
                self.answers,
                _describe(self.evaluator),
                _describe(self.metric),
                [digest(fields_of(example)) for example in train],
                *([_describe(getattr(type(student.module), "forward", None))] if whole else []),
            ]
        )


@dataclass
class Rounds:
    """The rounds of an optimiser on a program, and their single stages.

    Args:
        optimizer: its settings.
        run: where they are recorded.
        models: trains weak models and finds them again.
        program: bound to its strong LM.
        trainset: examples with ids.
        valset: examples with ids, none of which may be among ``trainset``.
        held_out: examples that must be in no pair, besides those of valset.
        lineage: the run's name in its pairs.
        depends_on: what answers depend on (prompts, settings, code), for the identity of what is
            recorded; by default what the optimiser can tell (:meth:`CoWest.meaning`).
        collecting: in the place of ``collect``, as it.
        first: the number of the first round. What is recorded of a round has its number in its
            name, so that the rounds of two steps of one run need different numbers.
        drafting: the weak LM of a teacher, which drafts in the place of the one that is tuned.
    """

    optimizer: CoWest
    run: RunContext
    models: TrainedModels
    program: Collaboration
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    held_out: Sequence[dspy.Example] = ()
    lineage: str = ""
    depends_on: str = ""
    collecting: Callable[..., Traces] = collect
    first: int = 1
    drafting: dspy.LM | None = None

    def __post_init__(self) -> None:
        self.rules, self.pairs = self.optimizer.rules, self.optimizer.pairs
        self.depends_on = self.depends_on or self.optimizer.meaning(self.program, self.trainset)

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
        store, name = self.run.store, step_name("collect", number)
        program = self._bind(self.drafting or start)
        optimizer = self.optimizer
        title = f"Collecting drafts and their influence{_of_round(number)}"
        about = (optimizer.evaluator, replace(optimizer.sampling, round=number))
        options: dict[str, Any] = {
            "store": store,
            "num_threads": optimizer.num_threads,
            "weak_threads": optimizer.weak_threads,
            "answers": optimizer.answers,
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
                    max_errors=optimizer.max_errors,
                    on_progress=progress,
                )
            return {}

        margin = [optimizer.sampling.margin] if optimizer.sampling.adaptive else []
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
        if self._has_source(number):
            names = names_hidden_in(self.run.folder)
            pairs = replace(
                PreferencePairs.load(str(self.pairs.source)),
                hiding=Hiding(names) if names else None,
            )
        else:
            pairs = preference_pairs(self.collect(start, number), **self.pairing)
        pairs = pairs.at_most(self.pairs.most, seed=self.optimizer.sampling.seed)
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
        if not isinstance(self.optimizer.tuner, KTO) or self._has_source(number):
            pairs = self.pair(start, number)
            pairs.check_enough(self.pairs.least)
            return self._as_rows(pairs)
        drafts = self.unpaired(start, number)
        drafts.save(self._file("drafts", number))
        drafts.check_enough(self.pairs.least)
        return drafts.rows(lineage=False)

    def rows_of(self, traces: Iterable[Trace]) -> list[dict[str, Any]]:
        """What a round would train on by pairs of these traces; nothing is written.

        Raises:
            PairsError: there are fewer than ``least``.
        """
        pairs = preference_pairs(traces, **self.pairing)
        pairs = pairs.at_most(self.pairs.most, seed=self.optimizer.sampling.seed)
        pairs.check_enough(self.pairs.least)
        return self._as_rows(pairs)

    def saved_rows(self, number: int) -> list[dict[str, Any]]:
        """The rows that a round which is done has collected, read from the run folder; without
        those that it replayed."""
        if not isinstance(self.optimizer.tuner, KTO) or self._has_source(number):
            return self._as_rows(PreferencePairs.load(self._file("pairs", number)))
        return UnpairedPreferences.load(self._file("drafts", number)).rows(lineage=False)

    def tune(self, name: str, title: str, start: dspy.LM, rows: list[dict[str, Any]]) -> dspy.LM:
        """The weak LM tuned from ``start`` on rows of pairs or labelled drafts; with SFT as the
        tuner, on the chosen drafts."""
        if isinstance(self.optimizer.tuner, SFT):
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        return self.models.train(name, title, start, rows, self.optimizer.tuner)

    def scores(self, lm: dspy.LM, number: int) -> Scores:
        """The score of every dev example when the weak model is ``lm``, of round ``number``; None
        where it failed."""
        program, title = self._bind(lm), f"Evaluating on the dev split{_of_round(number)}"

        def make() -> dict[str, Any]:
            with self.run.stage(step_name("dev", number), title) as progress:
                answers = arms.ask_all(
                    arms.collaboration_arm(program),
                    self.valset,
                    self.optimizer.metric,
                    store=self.run.store,
                    num_threads=self.optimizer.num_threads,
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

    def _has_source(self, number: int) -> bool:
        """Whether the pairs of a round were made elsewhere."""
        return self.pairs.source is not None and number == self.first

    def _as_rows(self, pairs: PreferencePairs) -> list[dict[str, Any]]:
        kto = isinstance(self.optimizer.tuner, KTO)
        return pairs.unpaired_rows() if kto else pairs.rows(lineage=False)

    def _step(self, number: int) -> str:
        return step_name("kto" if isinstance(self.optimizer.tuner, KTO) else "dpo", number)

    def _file(self, name: str, number: int) -> Path:
        return rows_file(self.run.folder, name, number)


def _of_round(number: int) -> str:
    return "" if number == 1 else f", round {number}"


def _draft_prompts(program: Collaboration) -> dict[str, Any]:
    """What a drafter's prompts are made of, without its models."""
    state = program.draft.deepcopy()
    state.set_lm(None)
    return state.dump_state()


def _hold_out(
    examples: Sequence[dspy.Example],
) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Examples to train on, and the last fifth, which decides and shares its inputs with none of
    the others."""
    first = len(examples) - int(HELD_OUT * len(examples))
    held = list(examples[first:])
    key = lambda example: inputs_key(dict(example.inputs().items()))  # noqa: E731
    decisive = {key(example) for example in held}
    return [example for example in examples[:first] if key(example) not in decisive], held


def _describe(metric: Any) -> str:
    """What a metric is, as far as it can be told: a function's source, an object's type and its
    plain values."""
    if inspect.isfunction(metric):
        try:
            return inspect.getsource(metric)
        except OSError:
            return metric.__qualname__
    plain = (
        {name: repr(value) for name, value in vars(metric).items() if isinstance(value, PLAIN)}
        if hasattr(metric, "__dict__")
        else {}
    )
    return f"{type(metric).__name__} {sorted(plain.items())}"
