"""How each arm of [evaluate] answers, and what its answers depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import dspy

from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.desk import Desk
from cowest_dspy.experiment.summary import arm_from
from cowest_dspy.influence import arms
from cowest_dspy.influence.metric import Metric
from cowest_dspy.optimizers.router import Routed, Router
from cowest_dspy.optimizers.stages import digest
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.report import Arm
from cowest_dspy.store.store import Store
from cowest_dspy.utils.importing import call


class Answers(Protocol):
    """What arms need of an experiment."""

    config: Config
    run: Path
    metric: Metric
    store: Store
    desk: Desk

    @cached_property
    def program(self) -> Collaboration:
        """Not bound."""
        ...

    @cached_property
    def strong(self) -> dspy.LM:
        """The strong model."""
        ...

    @cached_property
    def final(self) -> Collaboration:
        """On the models that all tuning ended with."""
        ...

    @property
    def best(self) -> Collaboration:
        """On the best weak model that there is."""
        ...

    def sft(self) -> dspy.LM:
        """The weak model that has learned the domain."""
        ...

    def answer_sft(self) -> dspy.LM:
        """The weak model that answers alone."""
        ...

    def controlled(self, name: str) -> Collaboration:
        """The program of a control."""
        ...


def kept_arm(
    part: Answers,
    arm: Arm,
    asking: arms.Answering,
    examples: Sequence[dspy.Example],
    *,
    record: str,
    depends_on: Sequence[Any],
    threads: int,
) -> Arm:
    """An arm with its answers: those that the store has as a record of that kind, when they
    depended on the same; otherwise asked, in a stage of its own, and kept. ``arm`` says its name,
    title and note."""
    identity = digest([*depends_on, [example.id for example in examples]])
    known = part.store.record(record, arm.name)
    if known and known["identity"] == identity:
        named = {**known, "title": arm.title, "note": arm.note}
        if named != known:
            part.store.keep(record, arm.name, named)
        return arm_from(arm.name, named)
    with part.desk.stage(stage_of(record, arm.name), f"Evaluating {arm.title}") as progress:
        answers = arms.ask_all(
            asking,
            examples,
            part.metric,
            store=part.store,
            num_threads=threads,
            on_progress=progress,
        )
    made = replace(arm, answers=answers)
    part.store.keep(record, arm.name, {**asdict(made), "identity": identity})
    return made


def stage_of(record: str, name: str) -> str:
    """The stage in which an arm is asked."""
    return f"{'compare' if record == 'compared' else 'evaluate'} {name}"


def answering(experiment: Answers, name: str) -> tuple[arms.Answering, str]:
    """How an arm answers, and the models (and prompts) that it uses."""
    wanted = experiment.config.evaluate
    if name == "weak":
        weak = experiment.answer_sft()
        module = call(wanted.weak or "")
        bound = experiment.program.bind(weak=weak)
        module.set_lm(bound.weak)
        return arms.module_arm(experiment.program, module), weak.model
    if name in ("strong", "oracle"):
        bound = experiment.program.bind(strong=experiment.strong)
        asking = (
            arms.alone_arm(bound)
            if name == "strong"
            else arms.oracle_arm(bound, wanted.oracle or "")
        )
        return asking, experiment.strong.model
    if name in ("collaboration", "strong_prompted"):
        program = experiment.final
        state = digest(program.dump_state())
        if name == "strong_prompted":
            return arms.alone_arm(
                program.with_fresh_baseline()
            ), f"{state}, {experiment.strong.model}"
        return arms.collaboration_arm(
            program
        ), f"{state}, {program.weak.model}, {experiment.strong.model}"
    if name == "routed":
        program, router = experiment.best, Router.load(experiment.run)
        state = digest([program.dump_state(), router.model_dump(mode="json", exclude={"about"})])
        routed = Routed(program, router)
        return lambda example: routed(
            **example.inputs()
        ), f"{state}, {program.weak.model}, {experiment.strong.model}"
    if name == "collaboration_sft":
        weak = experiment.sft()
        return arms.collaboration_arm(
            experiment.program.bind(weak=weak, strong=experiment.strong)
        ), f"{weak.model}, {experiment.strong.model}"
    program = experiment.controlled(name)
    state = f"{digest(program.dump_state())}, " if experiment.config.cycle else ""
    return arms.collaboration_arm(
        program
    ), f"{state}{program.weak.model}, {experiment.strong.model}"
