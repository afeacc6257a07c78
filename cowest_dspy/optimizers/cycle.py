"""Cycle: prompt and weight optimisers in a declared order, each step done once, every candidate on
the same valset.

    cycle = Cycle(
        metric=answer_match, strategy="prompts -> weights -> prompts", steps={"prompts": lambda
        program: dspy.GEPA(metric=Influence(answer_match, program), ...), "weights": CoWest(...)},
    )
    best = cycle.compile(program, trainset=train, valset=dev)
    print(best.steps)            # what each step brought

A step goes on from the best program so far; the best on the valset is what is given back. It was
chosen on that valset: test it on examples that no step has seen.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import dspy
from dspy.teleprompt import Teleprompter

from cowest_dspy.errors import ConfigError, ProgramError, nearest
from cowest_dspy.influence import arms
from cowest_dspy.influence.metric import Influence, Metric, metric_name
from cowest_dspy.lms.local.lora import reload_adapters
from cowest_dspy.optimizers.config import CycleRules, StepRules
from cowest_dspy.optimizers.rounds import Gain, Scores, gain
from cowest_dspy.optimizers.run import NoProgress, ProgressBars, RunContext, store_in_use
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.examples import Examples, fields_of, prepare_examples
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.record import unrecorded
from cowest_dspy.store.serialize import digest
from cowest_dspy.store.store import Store
from cowest_dspy.tuning import TunableEngine, engine_of
from cowest_dspy.utils import notebook
from cowest_dspy.utils.extras import check_extra
from cowest_dspy.utils.importing import load_function

ARROW = "->"
Target = Literal["draft", "refine", "both"]
MakeOptimizer = Teleprompter | Callable[[Collaboration], Teleprompter]


@dataclass(frozen=True)
class StepResult:
    """What one step brought. ``score`` is the mean on the ``n`` valset examples that were answered,
    in [0, 1]; ``gain`` is against the program that the cycle began with (None for that one itself);
    ``best`` says that it was the best when it was made."""

    number: int
    name: str
    weak: str
    score: float | None
    n: int
    failed: int
    best: bool
    gain: Gain | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepResult:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**values, "gain": Gain(**values["gain"]) if values["gain"] else None})

    def __str__(self) -> str:
        score = "no score" if self.score is None else f"{self.score:.3f}"
        return f"step {self.number}, {self.name}: {score} on {self.n} examples" + (
            f", gain {self.gain}" if self.gain else ""
        )


class StepHistory(tuple[StepResult, ...]):
    """The candidates of a cycle in order: a tuple, which a notebook shows as a table."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no steps"

    def _repr_html_(self) -> str:
        """One row for each candidate: its score on the valset, its gain over the start, and whether
        it was the best so far."""
        heads = ("step", "weak model", "best so far", "score", "n", "failed", "gain over the start")
        rows = [
            (
                f"{one.number} {one.name}",
                notebook.format_text(one.weak),
                "yes" if one.best else "",
                "-" if one.score is None else f"{one.score:.3f}",
                f"{one.n:,}",
                f"{one.failed:,}",
                one.gain.span if one.gain else "-",
            )
            for one in self
        ]
        return notebook.view(
            notebook.format_plural(len(self), "candidate"),
            notebook.table(heads, rows, texts=3, most=20) if rows else None,
        )


class Frozen(dspy.Module):
    """A module that optimisers leave alone."""

    def __init__(self, module: dspy.Module) -> None:
        super().__init__()
        self.module = module
        self._compiled = True

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The module's answer."""
        return self.module(**inputs)


class Cycled(Collaboration):
    """For types: a Collaboration that :meth:`Cycle.compile` made. ``steps`` is its history."""

    steps: StepHistory


class Cycle(Teleprompter):
    """Optimisers in the order of a strategy.

    A step trains as its optimiser says: by several processes where it is ``CoWest(...,
    processes=2)``.

    Args:
        metric: any DSPy metric with values in [0, 1]; it compares the candidates.
        strategy: names of ``steps``, in order, with "->" between them; one may stand there several
            times.
        steps: an optimiser for each name; or a function of the program as it is then, for
            optimisers whose metric is an Influence.
        targets: what a step may change: "draft", "refine" or "both" (the default). The strong model
            alone never changes.
        compile_args: further arguments of ``compile`` for a step, for instance ``{"prompts":
            {"num_trials": 10}}`` of MIPROv2.
        settings: by name of a step, what its optimiser is made of, as a string. A finished step is
            made anew when it has changed; without it, an optimiser of the same name counts as the
            same.
        confidence: of the interval of each gain.
        num_threads: examples that are evaluated at once.
        log_dir: the folder of the store, for resuming; by default a new temporary folder. A cycle
            inside a run uses that run's.
        progress: shows it.
        display_progress: where there is no ``progress``, whether to show each stage as a bar. None:
            in a terminal and in a notebook.

    Raises:
        ProgramError: a strategy that names no step, an unknown target.
    """

    def __init__(
        self,
        metric: Metric,
        strategy: str,
        steps: Mapping[str, MakeOptimizer],
        *,
        targets: Mapping[str, Target] | None = None,
        compile_args: Mapping[str, Mapping[str, Any]] | None = None,
        settings: Mapping[str, str] | None = None,
        confidence: float = 0.9,
        num_threads: int = 8,
        log_dir: str | Path | None = None,
        progress: NoProgress | None = None,
        display_progress: bool | None = None,
    ) -> None:
        self.metric, self.steps = metric, steps
        self.names = parse_strategy(strategy, steps)
        self.targets: dict[str, Target] = dict(targets or {})
        self.compile_args, self.settings = dict(compile_args or {}), dict(settings or {})
        for name in (*self.targets, *self.compile_args, *self.settings):
            parse_strategy(name, steps)
        for name, target in self.targets.items():
            if target not in ("draft", "refine", "both"):
                raise ProgramError(
                    f'The target of step "{name}" is "{target}": it is "draft", "refine" or "both".'
                )
        self.confidence, self.num_threads, self.log_dir, self.progress = (
            confidence,
            num_threads,
            log_dir,
            progress or ProgressBars(display_progress),
        )

    def __repr__(self) -> str:
        return (
            f"Cycle(metric={metric_name(self.metric)}, strategy={f' {ARROW} '.join(self.names)!r})"
        )

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        student: Collaboration,
        *,
        trainset: Examples,
        teacher: Any = None,
        valset: Examples,
    ) -> Cycled:
        """The best program on the valset, of the student and of what each step made of the best
        before it.

        Every call of a step is kept: after an interruption the same call goes on, finished steps
        are read, and the step that was interrupted runs again on kept answers.

        Raises:
            ProgramError: the student is no bound Collaboration, or an optimiser gives something
                else back.
            DataError: an empty trainset or valset, or an example that lacks an input of the
                program.
        """
        if not isinstance(student, Collaboration):
            raise ProgramError(
                f"Cycle optimises a Collaboration; a {type(student).__name__} was given."
            )
        train, held = (list(prepare_examples(one, student)) for one in (trainset, valset))
        with store_in_use(self.log_dir) as store:
            run = RunContext(store, self.progress)
            return _Compilation(self, run, train, held, teacher).best_of(student)


def parse_strategy(strategy: str, steps: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a strategy, in order.

    Raises:
        ProgramError: there is none, or one is not among ``steps``.
    """
    names = tuple(name.strip() for name in strategy.split(ARROW))
    for name in names:
        if name not in steps:
            raise ProgramError(
                f'The strategy "{strategy}" names "{name}", which is no '
                f"step.{nearest(name, steps)} Steps: {', '.join(steps)}."
            )
    return names


class _Compilation:
    """One compilation: the steps of a cycle in order."""

    def __init__(
        self,
        cycle: Cycle,
        run: RunContext,
        trainset: list[dspy.Example],
        valset: list[dspy.Example],
        teacher: Any,
    ) -> None:
        self._cycle, self._run, self._trainset, self._valset = cycle, run, trainset, valset
        self._teacher = teacher
        self._rounds = 0  # made by the steps so far: those of a later step count on from there
        self._data = digest([[fields_of(one) for one in split] for split in (trainset, valset)])

    def best_of(self, student: Collaboration) -> Cycled:
        """The best program of all steps, the first of which begins from ``student``."""
        store = self._run.store
        best = student.deepcopy()
        first = self._scores(best, "start")
        store.journal.scored("the start of the cycle", list(first.values()))
        done, highest = [_result(0, "start", best, first, None)], first
        store.forget("cycle")
        store.keep("cycle", "0", asdict(done[0]))
        for number, name in enumerate(self._cycle.names, start=1):
            made, scores = self._step(number, name, best)
            store.journal.scored(f"step {number}, {name}", list(scores.values()))
            better = (_mean(scores) or 0.0) > (_mean(highest) or 0.0)
            found = gain(first, scores, confidence=self._cycle.confidence)
            done.append(_result(number, name, made, scores, found, better))
            store.keep("cycle", str(number), asdict(done[-1]))
            self._run.say(str(done[-1]))
            if better:
                best, highest = made, scores
        cycled = cast("Cycled", best)
        cycled.steps, cycled._compiled = StepHistory(done), True
        return cycled

    def _step(self, number: int, name: str, program: Collaboration) -> tuple[Collaboration, Scores]:
        """The program that a step makes, and its scores: made now, or read when nothing of it has
        changed."""
        store, key = self._run.store, f"{number} {name}"
        target: Target = self._cycle.targets.get(name, "both")
        settings = self._cycle.settings.get(name)
        compiled: Collaboration | None = None

        def make() -> dict[str, Any]:
            nonlocal compiled
            with self._run.stage(key, f"Step {number}: {name}"), keeping(store):
                compiled = self._compile(name, target, program)
            return {
                "state": compiled.dump_state(),
                "weak": compiled.weak.model,
                "folder": self._relative(_adapter_folder(compiled.weak)),
                "scores": self._scores(compiled, key),
                "rounds": self._rounds,
                "settings": settings,
            }

        models = [program.weak.model, program.strong.model]
        step = store.step(
            "step",
            key,
            [key, target, program.dump_state(), *models, self._data],
            make,
            usable=lambda record: record.get("settings", settings) == settings,
        )
        if compiled is None:
            # A run of before that was recorded has the rounds of one step.
            counts = _numbers_rounds(self._cycle.steps[name])
            self._rounds = step.get("rounds", _last_round(store) if counts else self._rounds)
            compiled = self._load(step, program)
        return compiled, step["scores"]

    def _relative(self, folder: Path | None) -> str | None:
        """A folder in that of the run, relative to it: a run's folder may be moved."""
        if folder is None:
            return None
        whole = self._run.folder.resolve()
        inside = folder.resolve().is_relative_to(whole)
        return str(folder.resolve().relative_to(whole) if inside else folder)

    def _compile(self, name: str, target: Target, program: Collaboration) -> Collaboration:
        optimizer = self._cycle.steps[name]
        if not isinstance(optimizer, Teleprompter):
            optimizer = optimizer(program)
        student = program.deepcopy()
        student._compiled = False
        closed = {"draft": "refine", "refine": "draft"}.get(target)
        if closed:
            setattr(student, closed, Frozen(getattr(student, closed)))
        possible = {
            "trainset": list(self._trainset),
            "valset": list(self._valset),
            "teacher": self._teacher,
            "first_round": self._rounds + 1,
        }
        taken = inspect.signature(optimizer.compile).parameters
        wanted = {
            key: value for key, value in possible.items() if key in taken and value is not None
        }
        made = optimizer.compile(student, **{**wanted, **self._cycle.compile_args.get(name, {})})
        if _numbers_rounds(optimizer):
            self._rounds = _last_round(self._run.store)
        if not isinstance(made, Collaboration):
            raise ProgramError(
                f'Step "{name}", {type(optimizer).__name__}, gave a {type(made).__name__} and no '
                "Collaboration."
            )
        if closed:
            setattr(made, closed, cast("Frozen", getattr(made, closed)).module)
        return _rebind(made, program)

    def _load(self, step: Mapping[str, Any], program: Collaboration) -> Collaboration:
        made = program.deepcopy()
        made.load_state(step["state"])
        weak = program.weak
        if step["folder"] and step["weak"] != weak.model:
            reload_adapters(
                engine_of(unrecorded(weak)).load_adapter,
                {step["weak"]: str(self._run.folder / step["folder"])},
            )
            weak = weak.copy(model=step["weak"])
        return _rebind(made, program.bind(weak=weak))

    def _scores(self, program: Collaboration, name: str) -> Scores:
        with self._run.stage(f"valset, {name}", f"Evaluating on the valset: {name}") as progress:
            answers = arms.ask_all(
                arms.collaboration_arm(program),
                self._valset,
                self._cycle.metric,
                store=self._run.store,
                num_threads=self._cycle.num_threads,
                on_progress=progress,
            )
        return {answer.example_id: answer.score for answer in answers}


def _result(
    number: int,
    name: str,
    program: Collaboration,
    scores: Scores,
    found: Gain | None,
    better: bool = True,
) -> StepResult:
    answered = sum(score is not None for score in scores.values())
    failed = len(scores) - answered
    return StepResult(
        number, name, program.weak.model, _mean(scores), answered, failed, better, found
    )


def _rebind(made: Collaboration, before: Collaboration) -> Collaboration:
    """The program on its LMs again: several of DSPy's optimisers lose them, and some put their own
    in place."""
    found = next((predictor.lm for _, predictor in made.draft.named_predictors()), None)
    tuned = (
        isinstance(found, dspy.LM)
        and found.model != before.weak.model
        and _adapter_folder(found) is not None
    )
    weak = before.weak.copy(model=found.model) if found and tuned else before.weak
    bound = made.bind(weak=weak, strong=before.strong)
    bound.alone = before.alone.deepcopy()
    return bound


def _numbers_rounds(optimizer: MakeOptimizer) -> bool:
    return (
        isinstance(optimizer, Teleprompter)
        and "first_round" in inspect.signature(optimizer.compile).parameters
    )


def _last_round(store: Store) -> int:
    """The highest number of a round in the store; 0 where there is none."""
    return max(map(int, store.records("round")), default=0)


def _mean(scores: Scores) -> float | None:
    """The mean of what was answered, whatever the order; None where nothing was."""
    found = [score for score in scores.values() if score is not None]
    return math.fsum(found) / len(found) if found else None


def _adapter_folder(lm: dspy.LM) -> Path | None:
    """Where the adapter of an LM is; None for a base, and for models without adapters."""
    engine = unrecorded(lm).engine
    return engine.adapter_folder(lm.model) if isinstance(engine, TunableEngine) else None


# Optimisers by name, of [cycle.steps.NAME]


@dataclass(frozen=True)
class Tools:
    """What an optimiser is made with. ``metric`` scores answers, ``influence`` is that of the
    program's drafts with words for GEPA, ``lm`` is the strong model at temperature 1 for proposing,
    ``num_threads`` what may be asked at once, ``seed`` the run's."""

    program: Collaboration
    metric: Metric
    influence: Influence
    lm: dspy.LM
    num_threads: int
    seed: int


OPTIMIZERS: dict[str, dict[str, str]] = {
    "GEPA": {
        "metric": "influence",
        "reflection_lm": "lm",
        "num_threads": "num_threads",
        "seed": "seed",
    },
    "MIPROv2": {
        "metric": "metric",
        "prompt_model": "lm",
        "task_model": "lm",
        "num_threads": "num_threads",
        "seed": "seed",
    },
    "SIMBA": {"metric": "metric", "prompt_model": "lm", "num_threads": "num_threads"},
    "BootstrapFewShot": {"metric": "metric"},
    "BootstrapFewShotWithRandomSearch": {"metric": "metric", "num_threads": "num_threads"},
    "LabeledFewShot": {},
}
"""DSPy's optimisers that may be named, and which of the :class:`Tools` each argument is unless the
settings say otherwise."""


def settings_of(rules: StepRules) -> list[Any]:
    """What a step's optimiser is made of, JSON-able: its settings, and the digest of one's own
    code."""
    file = Path(rules.optimizer.rpartition(":")[0])
    # A key that came later and is not given: a cycle from before it goes on where it stood.
    settings = rules.model_dump(exclude=set() if rules.max_tokens else {"max_tokens"})
    return [settings, hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""]


def check_steps(cycle: CycleRules | None) -> None:
    """Sees, before anything is asked, that each optimiser of [cycle] exists, has its package, and
    takes its settings.

    Raises:
        ConfigError: it does not.
    """
    for name, rules in cycle.steps.items() if cycle else ():
        if ".py" in rules.optimizer or ":" in rules.optimizer:
            load_function(rules.optimizer)
            continue
        if rules.optimizer == "MIPROv2":
            check_extra("optimizers", f"[cycle.steps.{name}] MIPROv2")
        taken = inspect.signature(_class(name, rules.optimizer).__init__).parameters
        unknown = [key for key in rules.settings if key not in taken]
        if unknown:
            raise ConfigError(
                f"[cycle.steps.{name}] settings: {rules.optimizer} has no "
                f"{unknown[0]}.{nearest(unknown[0], taken)} "
                f"It has {', '.join(key for key in taken if key != 'self')}."
            )


def build_optimizer(name: str, rules: StepRules, tools: Tools) -> Teleprompter:
    """The optimiser of one step. One's own is made by a function ``make(tools, **settings)``.

    Raises:
        ConfigError: it cannot be made with these settings.
    """
    try:
        if rules.optimizer in OPTIMIZERS:
            parts = OPTIMIZERS[rules.optimizer].items()
            given = {name: getattr(tools, part) for name, part in parts} | rules.settings
            if rules.optimizer == "MIPROv2" and "num_candidates" in given:
                given.setdefault(
                    "auto", None
                )  # It takes one or the other, and a TOML cannot say None.
            made = _class(name, rules.optimizer)(**given)
        else:
            made = load_function(rules.optimizer)(tools, **rules.settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"[cycle.steps.{name}]: {rules.optimizer} cannot be made with these settings: {error}"
        ) from error
    if not isinstance(made, Teleprompter):
        raise ConfigError(
            f"[cycle.steps.{name}]: {rules.optimizer} gave a {type(made).__name__}; a "
            "Teleprompter is expected."
        )
    return made


def _class(name: str, optimizer: str) -> Any:
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"[cycle.steps.{name}] optimizer: there is no "
            f'"{optimizer}".{nearest(optimizer, OPTIMIZERS)} '
            f'Known: {", ".join(OPTIMIZERS)}; or "recipe.py:make".'
        )
    return getattr(dspy, optimizer)
