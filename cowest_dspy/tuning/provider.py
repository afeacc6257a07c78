"""TRLProvider: DSPy's way to tune an in-process model, so that ``dspy.LM.finetune`` and
``BootstrapFinetune`` work with it.

    weak = tunable(engine.lm())
    tuned = tune(weak, pairs, DPO(), "adapters/r1")
    tuned.lm            # a dspy.LM like ``weak``, with the adapter; its model id ends in a hash of
                        the adapter's weights

The provider is handed an engine: whatever has the four members of :class:`TunableEngine`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import dspy
from dspy.clients.provider import Provider, TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat
from pydantic import ValidationError

from cowest_dspy.errors import TooFewPairs, TuningError, nearest
from cowest_dspy.tuning.config import DPO, KTO, SFT
from cowest_dspy.tuning.data import Preferences, Row, check_tuner, read_rows, tuner_of
from cowest_dspy.tuning.launch import check_processes, launch
from cowest_dspy.tuning.train import OnStep, Tuned, train_adapter
from cowest_dspy.utils import notebook
from cowest_dspy.utils.progress_bars import progress_bar
from cowest_dspy.utils.settings import read_settings

if TYPE_CHECKING:
    from transformers import TrainerCallback

LEAST_PAIRS = 8
"""Fewer preference pairs, or labelled drafts, are not trained on; by default."""
TUNERS: dict[str, type[SFT | DPO | KTO]] = {"SFT": SFT, "DPO": DPO, "KTO": KTO}
FORMATS: dict[str, type[SFT | DPO | KTO]] = {
    "sft": SFT,
    "chat": SFT,
    "preference": DPO,
    "unpaired": KTO,
}
"""Data formats, and the settings that each is tuned on with."""
OPTIONS = (
    "settings",
    "output",
    "seed",
    "on_step",
    "callbacks",
    "adapter",
    "processes",
    "cache",
    "least",
)


@runtime_checkable
class TunableEngine(Protocol):
    """What a provider needs of an engine: its weights are on this machine, and it takes
    adapters."""

    base_folder: str
    """The folder or Hub id of the model without any adapter."""

    def adapter_folder(self, model: str) -> Path | None:
        """The adapter that a model id stands for; None for the base."""
        ...

    def load_adapter(self, folder: Path) -> str:
        """Makes an adapter available, and gives its model id, which holds a hash of its weights."""
        ...


class TuningCancelled(TuningError):
    """Training was stopped by ``job.cancel()``; nothing was saved."""


@dataclass(frozen=True)
class JobStatus:
    """Where a job is: ``state``, optimiser steps done and wanted (0 until training has begun), and
    the newest logs."""

    state: Literal["running", "cancelled", "failed", "done"]
    step: int
    total: int
    logs: Mapping[str, float]


class TRLTrainingJob(TrainingJob):
    """A training in a thread of ``dspy.LM.finetune``: ``result()`` gives the tuned LM, or raises
    what ended the training.

    DSPy hands a failure over as a result, which a caller who does not look would use as an LM. Here
    it is an exception: of ``result()``, of ``exception()``, and of whoever waits for the job, such
    as ``BootstrapFinetune``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tuned: Tuned | None = None
        self._cancel = threading.Event()
        self._progress: tuple[int, int, dict[str, float]] = (0, 0, {})

    def set_result(self, result: Any) -> None:
        """Ends the job: with an LM, or, when DSPy says so, with a failure."""
        if isinstance(result, BaseException):
            self.set_exception(result)
        else:
            super().set_result(result)

    def status(self) -> JobStatus:
        """Where the job is."""
        state: Literal["running", "cancelled", "failed", "done"] = "running"
        if self.done():
            error = self.exception()
            failed: Literal["cancelled", "failed"] = (
                "cancelled" if isinstance(error, TuningCancelled) else "failed"
            )
            state = failed if error else "done"
        return JobStatus(state, *self._progress)

    def cancel(self) -> bool:
        """Stops the training after the optimiser step that it is at; False when it is over
        already."""
        if self.done():
            return False
        self._cancel.set()
        return True

    def on_step(self, step: int, total: int, logs: dict[str, float]) -> None:
        """Notes the progress.

        Raises:
            TuningCancelled: someone has asked for it.
        """
        self._progress = (step, total, logs)
        if self._cancel.is_set():
            raise TuningCancelled(
                f"Training was cancelled at step {step} of {total}; nothing was saved."
            )


class TRLProvider(Provider):
    """Tunes the model of an in-process engine with TRL, and loads the result into that engine.

    ``train_kwargs``: ``settings`` (an ``SFT``, ``DPO`` or ``KTO``, or a dictionary of one),
        ``output`` (the adapter's folder), ``seed`` (default 0), ``on_step``, ``callbacks`` (of
        transformers' Trainer), ``adapter`` (to train further; by default the one that the model id
        names, None for a new one), ``processes`` (that train together, or a file of Accelerate's;
        default 1, this one), ``cache`` (a folder for the reference's log-probabilities of pairs),
        ``least`` (fewer pairs, or labelled drafts, are not trained on; default 8). Data
    formats: "sft" (prompt and completion), DSPy's chat (the last message is the completion),
        "preference" (prompt, chosen, rejected), and "unpaired" (prompt, completion, label).
    """

    def __init__(self, engine: TunableEngine) -> None:
        super().__init__()
        self.engine = engine
        self.finetunable = True
        self.TrainingJob = TRLTrainingJob

    # DSPy copies programs deeply; weights must not be copied with them.
    def __deepcopy__(self, memo: dict[int, Any]) -> TRLProvider:
        return self

    def __copy__(self) -> TRLProvider:
        return self

    def finetune(  # pyright: ignore[reportIncompatibleMethodOverride] - static in DSPy, called on the instance
        self,
        job: TrainingJob,
        model: str,
        train_data: Sequence[Row],
        train_data_format: TrainDataFormat | str | None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Trains, loads the adapter into the engine, and gives its model id.

        Raises:
            TuningError: options or data that do not fit, or a training that must not go on.
            TooFewPairs: fewer pairs, or labelled drafts, than ``least``.
            TuningCancelled: ``job.cancel()`` was called.
        """
        options = dict(train_kwargs or {})
        settings = _settings(_format(train_data_format), options)
        of_job = job if isinstance(job, TRLTrainingJob) else None
        options["on_step"] = _together(of_job and of_job.on_step, options.get("on_step"))
        options.setdefault("adapter", self.engine.adapter_folder(model))
        tuned = self.train(train_data, settings, **options)
        if of_job:
            of_job.tuned = tuned
        return self.engine.load_adapter(tuned.path)

    def train(
        self,
        rows: Iterable[Any] | Preferences,
        settings: SFT | DPO | KTO,
        output: str | Path,
        *,
        adapter: Path | None,
        seed: int = 0,
        on_step: OnStep | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        processes: int | str | Path = 1,
        cache: str | Path | None = None,
        least: int = LEAST_PAIRS,
    ) -> Tuned:
        """Train like :meth:`finetune`, from ``adapter`` (None: from the base), without loading the
        result."""
        rows = read_rows(rows, type(settings).__name__)
        check_tuner(rows, type(settings).__name__)
        found = len(rows)
        if not isinstance(settings, SFT) and found < least:
            raise TooFewPairs(
                f"Only {notebook.format_plural(found, 'preference pair')}. "
                "Sample more drafts (raise drafts), at a higher temperature, on more examples, or "
                f"lower margin when scores are graded. At least {least} are needed (least).",
                found,
                f"{notebook.format_plural(found, 'pair')}, {least} needed",
            )
        planned = check_processes(settings, processes, callbacks)
        train = (
            partial(launch, processes=planned)
            if planned.count > 1
            else partial(train_adapter, callbacks=callbacks)
        )
        return train(
            settings,
            rows,
            base=self.engine.base_folder,
            adapter=adapter,
            output=Path(output),
            seed=seed,
            on_step=on_step,
            cache=None if cache is None else Path(cache),
        )


@dataclass(frozen=True, repr=False)
class TunedLM:
    """What :func:`tune` gives: the tuned LM, its model id, and the training's result."""

    lm: dspy.LM
    model: str
    result: Tuned

    def __repr__(self) -> str:
        losses = [row["loss"] for row in self.result.history if "loss" in row]
        span = f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
        return f"TunedLM({self.model}, {len(losses)} steps{span}, {self.result.seconds:.0f} s)"

    def _repr_html_(self) -> str:
        """The training in a notebook: what it made, of what, and how the loss went."""
        made = self.result
        rows = [row for row in made.history if "loss" in row]
        picked = (
            [rows[place * (len(rows) - 1) // 4] for place in range(5)] if len(rows) > 5 else rows
        )
        margins = any("rewards/margins" in row for row in rows)
        heads = ("step", "loss", *(["reward margin"] if margins else []))
        cells = [
            (
                f"{row['step']:g}",
                f"{row['loss']:.3f}",
                *([f"{row.get('rewards/margins', float('nan')):+.3f}"] if margins else []),
            )
            for row in picked
        ]
        return notebook.view(
            f"Tuned: {self.model}",
            (
                f"{len(rows):,} optimiser steps on {made.trained_rows:,} rows, {made.tokens:,} "
                f"tokens, {made.seconds:,.0f} s"
            ),
            notebook.table(heads, cells) if cells else None,
        )


def tune(
    lm: dspy.LM,
    rows: Iterable[Any] | Preferences,
    settings: SFT | DPO | KTO | Mapping[str, Any],
    output: str | Path,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    processes: int | str | Path = 1,
    cache: str | Path | None = None,
    least: int = LEAST_PAIRS,
    display_progress: bool | None = None,
) -> TunedLM:
    """Trains a tunable LM further, from the adapter that it has, and gives the tuned one; ``lm``
    stays as it is. Unlike ``lm.finetune`` it runs in this thread, and a failure is raised.

    A training is done once: the same call gives the result that stands in ``output``, whose
    training.json says what it was trained on. Other settings, rows, starting weights or another
    seed are another training and need another folder: no adapter is overwritten, since LMs that
    were tuned before still read theirs. A training that was stopped resumes.

    Args:
        lm: what :func:`tunable` gave, or an earlier ``tune``.
        rows: ``PreferencePairs`` or ``UnpairedPreferences``, a ``datasets.Dataset``, or any rows
            that the settings are for (:func:`~cowest_dspy.tuning.train_adapter`). Pairs are for
            SFT their chosen drafts, for KTO a desirable and an undesirable draft each.
        settings: how to train, in TRL's names; a dictionary is of the fields of ``DPO`` for pairs,
            of ``KTO`` for labelled drafts, and otherwise of ``SFT``.
        output: the folder of the adapter.
        seed: of the new adapter, the order of rows and dropout.
        on_step: called with (step, steps, logs).
        callbacks: ``transformers.TrainerCallback`` instances, such as trl.RichProgressCallback().
            They are no part of what tells two trainings apart.
        processes: above 1 that many are started, one for each GPU, or on the CPU where there is
            none; the result is the same but for rounding. It may also be a configuration file of
            Accelerate's, such as those in programs/accelerate.
        cache: a folder for the reference's log-probabilities, for the next training on the same
            pairs from the same weights.
        least: fewer pairs, or labelled drafts, are not trained on: so few teach a model their own
            words.
        display_progress: whether to show a bar, as in ``dspy.Evaluate``. None: in a terminal and in
            a notebook, unless there is ``on_step``.

    Raises:
        ConfigError: a dictionary of settings with an unknown key or a value that cannot be.
        TooFewPairs: there are fewer.
        TuningError: an LM that is not tunable, data or a configuration file that do not fit, an
            ``output`` that holds another training, or a training that must not go on.
    """
    provider = lm.provider
    if not isinstance(provider, TRLProvider):
        raise TuningError(
            f"{lm.model} cannot be tuned here: its provider is {type(provider).__name__}. Use "
            "tunable(lm) first."
        )
    if isinstance(settings, Mapping):
        rows = rows if isinstance(rows, Preferences) else list(rows)
        settings = read_settings(settings, TUNERS[tuner_of(read_rows(rows, "DPO"))], "settings")
    with progress_bar(type(settings).__name__, display_progress, instead=on_step) as draw:
        show = None if draw is None else lambda step, total, _: draw(step, total)
        tuned = provider.train(
            rows,
            settings,
            output,
            adapter=provider.engine.adapter_folder(lm.model),
            seed=seed,
            on_step=_together(on_step, show),
            callbacks=callbacks,
            processes=processes,
            cache=cache,
            least=least,
        )
    model = provider.engine.load_adapter(tuned.path)
    return TunedLM(lm.copy(model=model), model, tuned)


def tunable(lm: dspy.LM) -> dspy.LM:
    """A copy of ``lm`` that can be tuned, by :func:`tune`, by ``finetune`` and by DSPy's
    ``BootstrapFinetune``.

    Raises:
        TuningError: its weights are not on this machine, or its engine takes no adapters.
    """
    return lm.copy(provider=TRLProvider(engine_of(lm)))


def engine_of(lm: dspy.LM) -> TunableEngine:
    """The engine behind an LM.

    Raises:
        TuningError: a hosted model, or a server that takes no adapters or whose weights are not
            named.
    """
    engine = lm.engine
    if not isinstance(engine, TunableEngine):
        raise TuningError(
            f"{lm.model} cannot be tuned here: its weights are not here, or what answers takes no "
            'adapters. Draft with a model in this process, LocalEngine("FOLDER or HUB ID").lm(), '
            "or with one behind a server of llama.cpp or vLLM whose weights are named. Without "
            "tuning there are collect, preference_pairs and Influence.report."
        )
    return engine


def _format(given: TrainDataFormat | str | None) -> str:
    name = given.value if isinstance(given, TrainDataFormat) else given
    if name not in FORMATS:
        raise TuningError(
            f"The data format {name!r} cannot be tuned on.{nearest(str(name), FORMATS)} Known: "
            f"{', '.join(FORMATS)}."
        )
    return name


def _settings(kind: str, options: dict[str, Any]) -> SFT | DPO | KTO:
    """The settings among ``train_kwargs``, taken out of them."""
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise TuningError(
            f"train_kwargs has no {unknown[0]!r}.{nearest(unknown[0], OPTIONS)} It has "
            f"{', '.join(OPTIONS)}; "
            "learning rates and the like belong to settings=SFT(...), DPO(...) or KTO(...)."
        )
    if "output" not in options:
        raise TuningError(
            'train_kwargs needs output, the folder of the adapter: {"settings": SFT(), "output": '
            '"adapters/first"}.'
        )
    wanted = FORMATS[kind]
    given = options.pop("settings", {})
    if isinstance(given, Mapping):
        try:
            return wanted(**given)
        except ValidationError as error:
            raise TuningError(f"settings are no {wanted.__name__}: {error}") from None
    if not isinstance(given, wanted):
        raise TuningError(
            f"{kind} data are tuned on with {wanted.__name__}(...), but settings is "
            f"{type(given).__name__}(...)."
        )
    return given


def _together(first: OnStep | None, second: OnStep | None) -> OnStep | None:
    if first is None or second is None:
        return first or second

    def both(step: int, total: int, logs: dict[str, float]) -> None:
        first(step, total, logs)
        second(step, total, logs)

    return both
