"""``cowest compare``: every arm of [compare] on the same examples, and the points of its sweep, as
one comparison.

Each arm is kept in the run's store when it is done, so that a comparison that was killed goes on
with the next; answers that arms have in common are asked once, since all share the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

import dspy

from cowest_dspy.errors import ConfigError, PairsError, RouterError, nearest
from cowest_dspy.experiment.arms import answerer, record_arm, stage_of
from cowest_dspy.experiment.config import Config, overridden
from cowest_dspy.experiment.experiment import Experiment
from cowest_dspy.experiment.routing import fit_run_router
from cowest_dspy.experiment.summary import (
    add_state,
    arm_title,
    describe_tuning,
    load_rounds,
    package_versions,
)
from cowest_dspy.experiment.tables import ArmRules, CompareRules
from cowest_dspy.influence.arms import restore_outputs
from cowest_dspy.influence.metric import score_of
from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.report import Arm, Stage
from cowest_dspy.report.compared import ComparedArm, Comparison, SweepPoint
from cowest_dspy.report.corpus import corpus_interval, is_corpus_metric
from cowest_dspy.report.numbers import describe_alike_drafts
from cowest_dspy.store.serialize import digest
from cowest_dspy.utils.importing import code_of, load_function

TUNED = ArmRules.model_validate({"kind": "collaboration", "weak": "tuned"})

_TITLES = {
    "alone": "strong alone",
    "strong": "strong alone",
    "self_refine": "strong alone, self-refine",
    "self_consistency": "strong alone, self-consistency",
    "rag": "strong with retrieved passages (RAG)",
    "grounded": "collaboration, drafts from retrieved passages",
    "super_icl": "SuperICL: strong with weak answers and their confidence",
    "routed": "collaboration, by the router",
    "oracle": "ceiling: strong with gold background",
}
_STATES = {"base": "as it came", "sft": "after SFT", "tuned": "after preference tuning"}


ASIDE: Any = {"tracking": True, "ray": True, "compare": {"smallest"}}
"""Tables and keys in which runs may differ and are one variant all the same."""


def _folder_name(changes: dict[str, Any], config: Config) -> str:
    text = "-".join(
        f"{key}-{value}"
        for key, value in sorted(changes.items())
        if isinstance(value, str | int | float)
    )
    plain = "".join(char if char.isalnum() or char in "._-" else "-" for char in text).strip(".-")
    short = len(plain) <= 60 and all(
        isinstance(value, int) or str(value).isidentifier() for value in changes.values()
    )
    return (
        plain
        if short and plain
        else f"{plain[:40]}-{digest(config.model_dump(mode='json', exclude=ASIDE))}".lstrip("-")
    )


def title_of(rules: ArmRules, part: Experiment) -> str:
    """The title of an arm: its own, or after what it is. One on the tuned weak model is
    called untuned where no tuning was taken, as far as that is known in ``part``."""
    state = (
        describe_tuning(part.store)
        if rules.weak == "tuned" or rules.control == "other_draft"
        else _STATES[rules.weak]
    )
    doubt = state if state.startswith("untuned") else ""
    if rules.title:
        return add_state(rules.title, doubt) if doubt else rules.title
    if rules.transfer:
        same = rules.model_copy(update={"transfer": False})
        return f"{title_of(same, part)}, another strong model"
    draft = f", draft = {rules.draft}" if rules.draft else ""
    if rules.kind == "control":
        if rules.control != "other_draft":
            return arm_title(str(rules.control), part.config, part.store) + draft
        return f"control: {doubt or 'tuned'}, with the draft of another example{draft}"
    if rules.kind == "weak":
        return add_state("weak alone", state) + (
            f", {rules.shots} worked examples" if rules.shots else ""
        )
    if rules.kind == "collaboration":
        return add_state("collaboration", state) + draft
    if rules.kind == "module":
        return f"{rules.program}".rpartition("/")[2] + f" on the {rules.role} model"
    more = {
        "strong": rules.style == "chain_of_thought" and ", chain of thought",
        "self_consistency": f", {rules.samples} samples",
    }
    title = _TITLES[rules.kind] + (more.get(rules.kind) or "")
    return add_state(title, doubt) if doubt else title


def depends_on_seed(rules: ArmRules, config: Config) -> bool:
    """Whether another seed of the run can give the arm another answer: where something is trained
    or drawn, or a model samples."""
    samples = bool(config.strong.temperature) or (
        rules.role == "weak" and bool(config.weak.temperature)
    )
    greedy = rules.kind in ("alone", "strong", "self_refine", "rag", "oracle", "module")
    base = (
        rules.weak == "base"
        and not rules.shots
        and rules.kind in ("weak", "collaboration", "grounded")
    )
    return samples or not (greedy or (base and not config.weak.temperature))


class Compared:
    """The comparison of a run.

    Args:
        experiment: the run; its configuration has [compare].

    Raises:
        ConfigError: there is no [compare], or a score of ``also`` is no function.
    """

    def __init__(self, experiment: Experiment) -> None:
        if experiment.config.compare is None:
            raise ConfigError(
                "The configuration has no [compare]: declare arms, [compare.arms.NAME] with a "
                "kind, in the task's file or in "
                "one of its own."
            )
        self.rules: CompareRules = experiment.config.compare
        self.experiment = experiment
        self._variants: dict[str, Experiment] = {}
        self.scores = {
            reference.rpartition(":")[2]: load_function(reference) for reference in self.rules.also
        }
        self.warnings: list[str] = []

    def run(self, only: Sequence[str] | None = None) -> Comparison:
        """The comparison, with every arm and every point of the sweep, or with these arms alone.

        An arm whose weak model cannot be tuned, since there are too few pairs, is left out with a
        warning; so is a router for which too little was observed.

        Raises:
            ConfigError: ``only`` names an arm that there is not; or an arm lacks what it needs.
        """
        for name in only or ():
            if name not in self.rules.arms:
                raise ConfigError(
                    f'There is no arm "{name}" in [compare.arms].{nearest(name, self.rules.arms)}'
                )
        wanted = {
            name: rules for name, rules in self.rules.arms.items() if only is None or name in only
        }
        made = [one for name, rules in wanted.items() for one in self._arm(name, rules)]
        points = (
            []
            if only is not None
            else [one for changes in self._grid() for one in self._point(changes)]
        )
        config = self.experiment.config
        return Comparison(
            title=f"{config.name}: comparison",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            against=self.rules.against,
            metric=getattr(
                self.experiment.metric, "__name__", type(self.experiment.metric).__name__
            ),
            arms=tuple(made),
            sweep=tuple(points),
            config=config.model_dump(mode="json"),
            versions=package_versions(),
            warnings=tuple(filter(None, (*self.warnings, describe_alike_drafts(_by_seed(made))))),
            target=self._target(),
            controls=self._controls(),
        )

    def _target(self) -> str:
        """The arm that the verdict is about: the first tuned collaboration."""
        tuned = (name for name, rules in self.rules.arms.items() if _is_tuned(rules))
        return next(tuned, "collaboration")

    def _controls(self) -> dict[str, tuple[str, ...]]:
        """The controls of each tuned collaboration: those of its own format of drafts."""
        rules, own = self.rules.arms, self.experiment.config.draft
        tuned = {name: arm.draft or own for name, arm in rules.items() if _is_tuned(arm)}
        controls = {name: arm.draft or own for name, arm in rules.items() if arm.kind == "control"}
        return {
            name: tuple(one for one, of in controls.items() if of == draft)
            for name, draft in tuned.items()
        }

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs that are compared as one."""
        return self.rules.seeds or (self.experiment.config.seed,)

    def _variant(self, changes: dict[str, Any]) -> Experiment:
        """The run with these dotted keys changed, made once; the run itself where that changes
        nothing.

        Raises:
            ConfigError: an unknown key, or a value that cannot be.
        """
        base = self.experiment.config
        made = {
            key: value for key, value in changes.items() if overridden(base, {key: value}) != base
        }
        if not made:
            return self.experiment
        config = overridden(base, made)
        name = _folder_name(made, config)
        if name not in self._variants:
            self._variants[name] = self.experiment.variant(name, config)
        return self._variants[name]

    def _arm(self, name: str, rules: ArmRules) -> Iterator[ComparedArm]:
        seeds = self.seeds if depends_on_seed(rules, self.experiment.config) else self.seeds[:1]
        for seed in seeds:
            changes: dict[str, Any] = {"seed": seed}
            if rules.draft:
                changes["draft"] = rules.draft
            found = self._measure_arm(self._variant(changes), name, rules, seed)
            if found:
                yield found

    def _grid(self) -> Iterator[dict[str, Any]]:
        sweep = self.rules.sweep
        for values in product(*sweep.values()) if sweep else ():
            yield dict(zip(sweep, values, strict=True))

    def _point(self, changes: dict[str, Any]) -> Iterator[SweepPoint]:
        for seed in self.seeds:
            part = self._variant({"seed": seed, **changes})
            found = self._measure_arm(part, "tuned", TUNED, seed)
            if found:
                rounds = load_rounds(part.store)
                trained = sum(
                    made.pairs - made.replayed for made in rounds if made.outcome != "skipped"
                )
                yield SweepPoint(_plain(changes), found, pairs=trained if rounds else None)

    def _measure_arm(
        self, part: Experiment, name: str, rules: ArmRules, seed: int
    ) -> ComparedArm | None:
        try:
            arm = self._answer_arm(part, name, rules)
        except PairsError as error:
            self.warnings.append(
                f"{title_of(rules, part)} (seed {seed}) is left out, since it cannot be tuned: "
                f"{error}"
            )
            return None
        except RouterError as error:
            self.warnings.append(f"{title_of(rules, part)} (seed {seed}) is left out: {error}")
            return None
        stage = stage_of("compared", name)
        known, cost = part.store.record("stage", stage) or {}, part.store.cost(stage)
        extra, intervals = self._more_scores(arm, part.splits[self.rules.split], part.program)
        kept = Stage(stage, **(known | cost)) if known or cost["calls"] else None
        return ComparedArm(arm, seed, extra, intervals, kept)

    def _answer_arm(self, part: Experiment, name: str, rules: ArmRules) -> Arm:
        # Fitted for the best weak model that there is by now.
        if rules.kind == "routed" and not rules.router:
            part.collect()
            fit_run_router(part)
        made = answerer(part, rules.model_copy(update={"draft": None}))
        return record_arm(
            part,
            Arm(name, title_of(rules, part), (), note=made.note),
            made,
            part.splits[self.rules.split],
            record="compared",
            depends_on=[
                rules.kind,
                made.depends_on,
                code_of([rules.program, rules.corpus, rules.router]),
            ],
        )

    def _more_scores(
        self, arm: Arm, examples: Sequence[dspy.Example], program: Collaboration
    ) -> tuple[dict[str, float | None], dict[str, tuple[float, float] | None]]:
        """The scores of [compare] also. Failures are none of a score of single examples; one of a
        corpus is told of them."""
        field, types = program.answer_fields[-1], program.output_types
        kept = [restore_outputs(answer, field, types) for answer in arm.answers]
        given = [None if outputs is None else dspy.Prediction(**outputs) for outputs in kept]
        values: dict[str, float | None] = {}
        ends: dict[str, tuple[float, float] | None] = {}
        for name, metric in self.scores.items():
            span: Interval | None = None
            if not is_corpus_metric(metric):
                scores = [
                    score_of(metric, example, dict(one.items()))
                    for example, one in zip(examples, given, strict=True)
                    if one is not None
                ]
                values[name] = sum(scores) / len(scores) if scores else None
                span = bootstrap_mean_interval([[score] for score in scores])
            elif any(one is not None for one in given):
                values[name] = float(metric(examples, given))
                span = corpus_interval(metric, examples, given)
            else:
                values[name] = None
            ends[name] = (span.low, span.high) if span else None
        return values, ends


def _is_tuned(rules: ArmRules) -> bool:
    return rules.kind == "collaboration" and rules.weak == "tuned" and not rules.transfer


def _by_seed(made: Sequence[ComparedArm]) -> Iterator[Arm]:
    """The arms, each named with its seed where it has several."""
    several = Counter(one.arm.name for one in made)
    for one in made:
        yield (
            replace(one.arm, title=f"{one.arm.title} (seed {one.seed})")
            if several[one.arm.name] > 1
            else one.arm
        )


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    """Settings as a chart names them: of a whole table of a model its id."""
    return {
        key: value.get("model", str(value)) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
