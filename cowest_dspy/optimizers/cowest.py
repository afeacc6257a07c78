"""CoWest as a DSPy optimiser: rounds of collecting, pairing, tuning and deciding, in one
``compile``.

    optimizer = CoWest(metric=answer_match, tuner=DPO(beta=0.1), drafts=4, rounds=2)
    better = optimizer.compile(program, trainset=train, valset=dev)
    better.rounds[0].reason      # "gain +0.100 [+0.025, +0.175] on 40 examples (4 better, 0 worse):
                                 ..."

It plugs into ``dspy.BetterTogether`` as any weight optimiser: ``BetterTogether(metric=m,
p=dspy.GEPA(...), w=CoWest(...))``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import dspy
from dspy.teleprompt import Teleprompter

from cowest_dspy.errors import ProgramError
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.judge import Rubric
from cowest_dspy.influence.metric import Metric, named
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.optimizers.rounds import RoundHistory, Rounds
from cowest_dspy.optimizers.run import NoProgress, RunContext, store_in_use
from cowest_dspy.optimizers.trained import TrainedModels
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.program.collaboration import Collaboration, prompt_adapter
from cowest_dspy.program.examples import check_inputs, with_ids
from cowest_dspy.store.record import unrecorded
from cowest_dspy.store.serialize import digest
from cowest_dspy.tuning import DPO, KTO, SFT, TRLProvider, check_processes, tunable

PLAIN = (str, int, float, tuple, Rubric)
HELD_OUT = 0.2
"""The part of the trainset that decides, when there is no valset."""

logger = logging.getLogger(__name__)


class Tuned(Collaboration):
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
            chosen drafts, or ``KTO`` on all drafts that helped or hurt, as such.
        drafts: drafts sampled for each example.
        rounds: how many rounds, at most; or ``RoundRules`` with the thresholds of taking one.
        evaluator: what influence is made of, where it is not ``metric``: a Judge, a GoldLikelihood,
            several Weighted.
        sampling: temperature, top_p, seed, adaptive sampling; overrides ``drafts``.
        pairs: ``PairRules``, the rules of the gate: margin, strategy, least, ...
        answers: how often a strong model that samples is asked; the scores are averaged.
        max_errors: the largest share of drafts that may fail, in [0, 1].
        num_threads: questions to the strong model under way at once. weak_threads: drafts under
            way at once.
        seed: of sampling and training.
        processes: that train together, one for each GPU, or on the CPU where there is none; or a
            file of Accelerate's (tuning.md).
        log_dir: the folder of store and adapters, for resuming; by default a new temporary folder,
            which is kept. Inside ``keeping(store)``, as in a Cycle, it is that store's.
        progress: shows it, for instance ``cowest_dspy.cli.progress.Progress()``.

    The student's weak LM must be one that can be tuned: an in-process model, or a server that takes
    adapters.

    Raises:
        TuningError: a tuner that so many processes cannot train by.
    """

    def __init__(
        self,
        metric: Metric,
        tuner: DPO | KTO | SFT | None = None,
        drafts: int = 4,
        rounds: int | RoundRules = 1,
        *,
        evaluator: Metric | None = None,
        sampling: Sampling | None = None,
        pairs: PairRules | None = None,
        answers: int = 1,
        max_errors: float = MAX_ERRORS,
        num_threads: int = 8,
        weak_threads: int | None = None,
        seed: int = 0,
        processes: int | str | Path = 1,
        log_dir: str | Path | None = None,
        progress: NoProgress | None = None,
    ) -> None:
        self.metric, self.evaluator, self.tuner = metric, evaluator or metric, tuner or DPO()
        self.sampling = sampling or Sampling(drafts, seed=seed)
        self.rules = (
            rounds
            if isinstance(rounds, RoundRules)
            else RoundRules.model_validate({"count": rounds})
        )
        self.pairs = pairs or PairRules.model_validate({})
        self.answers, self.max_errors, self.num_threads, self.weak_threads = (
            answers,
            max_errors,
            num_threads,
            weak_threads,
        )
        self.seed, self.processes, self.log_dir = seed, processes, log_dir
        self.progress = progress or NoProgress()
        if processes != 1:
            check_processes(self.tuner, processes)  # Now, and not when all drafts are collected.

    def __repr__(self) -> str:
        about = (
            f"tuner={self.tuner!r}, drafts={self.sampling.drafts}, rounds={self.rules.count}, "
            f"seed={self.seed}"
        )
        return f"CoWest(metric={named(self.metric)}, {about})"

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        student: Collaboration,
        *,
        trainset: Sequence[dspy.Example],
        teacher: Any = None,
        valset: Sequence[dspy.Example] | None = None,
        first_round: int = 1,
    ) -> Tuned:
        """A copy of ``student`` with the weak model of the last round that was taken; the student
        stays as it is.

        Only the weak model is trained, on its own completions. Without a valset, the last fifth of
        the trainset decides. Calls, traces and adapters are kept in ``log_dir``: the same call goes
        on there where it was interrupted. ``first_round`` is the number of the first round, and in
        the names of what is kept: a Cycle counts on from the rounds of the steps before.

        Raises:
            ProgramError: the student is no bound Collaboration, or a teacher is given: drafts come
                from the model that is tuned.
            DataError: an example that lacks an input of the program.
            TuningError: a weak LM that cannot be tuned, or a training that must not go on.
            PairsError: the first round gave fewer pairs (with KTO: labelled drafts) than
                ``pairs.least``, or with KTO only drafts that helped, or only drafts that hurt.
        """
        _check(student, teacher)
        examples = with_ids(trainset)
        held = (
            with_ids(valset)
            if valset is not None
            else examples[len(examples) - int(HELD_OUT * len(examples)) :]
        )
        check_inputs(student, [*examples, *held])
        train = examples if valset is not None else examples[: len(examples) - len(held)]
        weak = unrecorded(student.weak)
        start = weak if isinstance(weak.provider, TRLProvider) else tunable(weak)
        with store_in_use(self.log_dir, strong=student.strong.model) as store:
            run = RunContext(store, self.progress)
            logger.info("CoWest works in %s", run.folder)
            models = TrainedModels(run, start, self.seed, processes=self.processes)
            rounds = self.rounds(run, models, student, train, held, first=first_round)
            lm, history = rounds.run_all(start)
        made = cast("Tuned", student.bind(weak=lm) if lm is not start else student.deepcopy())
        made.rounds, made.log_dir, made._compiled = history, run.folder, True
        return made

    def rounds(
        self,
        run: RunContext,
        models: TrainedModels,
        program: Collaboration,
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example],
        **options: Any,
    ) -> Rounds:
        """The rounds that :meth:`compile` goes through, for one who goes through their stages.

        ``program`` is bound to its strong LM, examples have ids; ``options`` are further arguments
        of :class:`Rounds`. Without ``depends_on`` it is the digest of program, examples and
        settings.
        """
        if "depends_on" not in options:
            options["depends_on"] = self._meaning(program, trainset)
        return Rounds(
            run=run,
            models=models,
            program=program,
            trainset=trainset,
            valset=valset,
            metric=self.metric,
            evaluator=self.evaluator,
            tuner=self.tuner,
            sampling=self.sampling,
            pairs=self.pairs,
            rules=self.rules,
            num_threads=self.num_threads,
            weak_threads=self.weak_threads,
            answers=self.answers,
            max_errors=self.max_errors,
            **options,
        )

    def _meaning(self, student: Collaboration, train: Sequence[dspy.Example]) -> str:
        return digest(
            [
                student.dump_state(),
                type(prompt_adapter(student.adapter)).__name__,
                vars(self.sampling),
                self.answers,
                _describe(self.evaluator),
                _describe(self.metric),
                [digest(example.toDict()) for example in train],
            ]
        )


def _check(student: Any, teacher: Any) -> None:
    if not isinstance(student, Collaboration):
        raise ProgramError(f"CoWest tunes a Collaboration; a {type(student).__name__} was given.")
    if teacher is not None:
        raise ProgramError(
            "CoWest takes no teacher: it samples drafts of the weak model that it tunes."
        )
    _ = student.weak, student.strong


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
