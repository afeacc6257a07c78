"""Arms: the ways to answer the held-out examples, those of [evaluate] and of [compare]; and the
controls, which are like the collaboration but for the influence.

What works as well with a control was not influence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import dspy

from cowest_dspy.errors import ConfigError, PairsError
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.data import from_recipe
from cowest_dspy.experiment.summary import build_arm, load_arm, load_rounds
from cowest_dspy.experiment.tables import ArmRules
from cowest_dspy.influence import arms
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.trace import Trace
from cowest_dspy.lms.build import build_lm
from cowest_dspy.lms.config import LMSettings
from cowest_dspy.optimizers.router import Routed, Router
from cowest_dspy.optimizers.run import RunContext
from cowest_dspy.program import (
    Retriever,
    SelfConsistency,
    SelfRefine,
    chain_of_thought,
    few_shot,
    grounded,
    rag,
    super_icl,
)
from cowest_dspy.program.collaboration import Collaboration, signature_of
from cowest_dspy.report import Arm, describe_rounds
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.store import Store
from cowest_dspy.utils.importing import call

SHOTS = 4  # worked examples of SuperICL, where the arm does not say how many


class _Parts(Protocol):
    """What arms need of an Experiment."""

    config: Config
    run: Path
    metric: Metric
    store: Store
    context: RunContext

    program: cached_property[Collaboration]
    strong: cached_property[dspy.LM]
    weak: cached_property[dspy.LM]
    splits: cached_property[dict[str, list[dspy.Example]]]
    final: cached_property[Collaboration]

    @property
    def best(self) -> Collaboration: ...

    meaning: cached_property[str]

    def sft(self) -> dspy.LM: ...
    def answer_sft(self) -> dspy.LM: ...
    def tune(self) -> dspy.LM: ...
    def controlled(self, name: str) -> Collaboration: ...


@dataclass(frozen=True)
class Answerer:
    """How an arm answers, and what that depends on besides the run's meaning (prompts, demos, model
    ids)."""

    answering: arms.Answering
    depends_on: Any
    note: str = ""
    num_threads: int = 8

    def on(self, *more: Any) -> Answerer:
        """The same, depending on more."""
        return replace(self, depends_on=[self.depends_on, *more])


# [evaluate]


def arm_names(config: Config, *, routed: bool) -> list[str]:
    """The arms of [evaluate], in the order of the table; ``routed``: the run has a router."""
    wanted = config.evaluate
    weak = ["weak"] if wanted.weak else []
    oracle = ["oracle"] if wanted.oracle else []
    prompted = ["strong_prompted"] if config.cycle and config.cycle.steps else []
    tuned = ["collaboration_sft", "collaboration", *(["routed"] if routed else [])]
    return [*weak, "strong", *prompted, *tuned, *oracle, *wanted.controls]


def evaluate_arm(experiment: _Parts, name: str) -> Arm:
    """An arm of [evaluate] on its split: recorded, or asked now."""
    wanted = experiment.config.evaluate
    made = _evaluated(experiment, name)
    return record_arm(
        experiment,
        build_arm(name, experiment.config, experiment.store),
        made,
        experiment.splits[wanted.split],
        record="arm",
        depends_on=[made.depends_on, wanted.model_dump(mode="json", exclude={"controls"})],
    )


def _evaluated(experiment: _Parts, name: str) -> Answerer:
    if name == "strong_prompted":
        program = experiment.final
        return _of_program(experiment, program, arms.alone_arm(program.with_fresh_baseline()))
    sft = experiment.config.sft
    rules = {
        "weak": {"kind": "weak", "weak": "sft" if sft and sft.answers else "base"},
        "strong": {"kind": "alone"},
        "routed": {"kind": "routed"},
        "oracle": {"kind": "oracle"},
        "collaboration": {"kind": "collaboration", "weak": "tuned"},
        "collaboration_sft": {"kind": "collaboration", "weak": "sft"},
    }.get(name, {"kind": "control", "control": name})
    return answerer(experiment, ArmRules.model_validate(rules))


def record_arm(
    experiment: _Parts,
    arm: Arm,
    made: Answerer,
    examples: Sequence[dspy.Example],
    *,
    record: str,
    depends_on: Sequence[Any],
) -> Arm:
    """An arm with its answers: those that the store has as a record of that kind, when they
    depended on the same; otherwise asked, in a stage of its own. ``arm`` says its name, title and
    note."""

    def ask() -> dict[str, Any]:
        title = f"{'Comparing' if record == 'compared' else 'Evaluating'} {arm.title}"
        with experiment.context.stage(stage_of(record, arm.name), title) as progress:
            answers = arms.ask_all(
                made.answering,
                examples,
                experiment.metric,
                store=experiment.store,
                num_threads=made.num_threads,
                on_progress=progress,
            )
        return asdict(replace(arm, answers=answers))

    asked = [example.id for example in examples]
    whole = [experiment.meaning, *depends_on, asked]
    known = experiment.store.step(record, arm.name, whole, ask)
    named = {**known, "title": arm.title, "note": arm.note}
    if named != known:
        experiment.store.keep(record, arm.name, named)
    return load_arm(arm.name, named)


def stage_of(record: str, name: str) -> str:
    """The stage in which an arm is asked."""
    return f"{'compare' if record == 'compared' else 'evaluate'} {name}"


# The kinds of [compare]


def answerer(experiment: _Parts, rules: ArmRules) -> Answerer:
    """The arm of these rules in a run. Whatever has to be trained for it, is.

    Raises:
        ConfigError: the configuration lacks what the arm needs.
        PairsError: there are too few pairs for a model that has to be tuned.
    """
    if rules.draft and rules.draft != experiment.config.draft:
        raise ConfigError(
            f'An arm with draft = "{rules.draft}" belongs to the variant of that format.'
        )
    made = _KINDS[rules.kind](experiment, rules)
    other = _transfer(experiment, rules)
    return replace(made, num_threads=other.concurrency) if other else made


def _of_program(
    experiment: _Parts,
    program: Collaboration,
    answering: arms.Answering | None = None,
    note: str = "",
) -> Answerer:
    """A collaboration, by default with a draft: what it depends on is its prompts and demos, and
    its two models."""
    models = {one.lm.model for _, one in program.named_predictors() if one.lm is not None}
    depends_on = [program.dump_state(), sorted(models)]
    answering = answering or arms.collaboration_arm(program)
    return Answerer(answering, depends_on, note, experiment.config.at_once("strong"))


def _of_module(
    experiment: _Parts, module: dspy.Module, role: str, lm: dspy.LM, *, note: str = ""
) -> Answerer:
    """A module by itself on the model of a role, in the prompts' format of the run's program."""
    module.set_lm(lm)
    for _, predictor in module.named_predictors():
        predictor.lm = lm
    unbound = module.deepcopy()
    unbound.set_lm(None)
    depends_on = [type(module).__name__, unbound.dump_state(), lm.model]
    answering = arms.module_arm(experiment.program, module)
    return Answerer(answering, depends_on, note, experiment.config.at_once(role))


def _alone(experiment: _Parts, rules: ArmRules) -> Answerer:
    bound = experiment.program.bind(strong=_strong_of(experiment, rules))
    note = "the instructions, demos and room of refining, less the draft"
    return _of_program(experiment, bound, arms.alone_arm(bound), note)


def _strong_of(experiment: _Parts, rules: ArmRules) -> dspy.LM:
    """The run's strong LM; of an arm of transfer the one of [compare.transfer]."""
    other = _transfer(experiment, rules)
    return build_lm(other) if other else experiment.strong


def _transfer(experiment: _Parts, rules: ArmRules) -> LMSettings | None:
    """The other strong model of an arm of transfer."""
    compare = experiment.config.compare
    return compare.transfer if rules.transfer and compare else None


def _strong(experiment: _Parts, rules: ArmRules) -> Answerer:
    if rules.style == "direct":
        return _alone(experiment, rules)
    return _on_strong(experiment, chain_of_thought(experiment.program))


def _self_refine(experiment: _Parts, rules: ArmRules) -> Answerer:
    return _on_strong(experiment, SelfRefine(experiment.program, rounds=rules.rounds))


def _self_consistency(experiment: _Parts, rules: ArmRules) -> Answerer:
    module = SelfConsistency(
        experiment.program, samples=rules.samples, temperature=rules.temperature
    )
    return _on_strong(experiment, module, [rules.samples, rules.temperature])


def _on_strong(experiment: _Parts, module: dspy.Module, more: Any = None) -> Answerer:
    lm = experiment.program.bind(strong=experiment.strong).strong
    return _of_module(experiment, module, "strong", lm).on(more)


def _weak(experiment: _Parts, rules: ArmRules) -> Answerer:
    """The weak model by itself: with the recipe's own program, otherwise with the task as the
    strong model is given it."""
    sft = experiment.config.sft
    if rules.weak == "tuned":
        return _drafts_as_answers(experiment, experiment.final)
    if (
        rules.weak == "sft"
        and sft
        and not sft.answers
        and not rules.shots
        and _drafts_answer(experiment.program)
    ):
        return _drafts_as_answers(
            experiment, experiment.program.bind(weak=experiment.sft(), strong=experiment.strong)
        )
    module = _weak_alone(experiment)
    if rules.shots:
        module = few_shot(module, experiment.splits["train"], rules.shots, experiment.config.seed)
    lm = experiment.weak if rules.weak == "base" else experiment.answer_sft()
    return _of_module(experiment, module, "weak", experiment.program.bind(weak=lm).weak)


def _weak_alone(experiment: _Parts) -> dspy.Module:
    """The program by which the weak model answers alone: that of [evaluate] weak, or the one of the
    strong model without its demos."""
    reference = experiment.config.evaluate.weak
    if reference:
        return call(reference, offered=experiment.config.data.given)
    module = experiment.program.alone.module.deepcopy()
    for _, predictor in module.named_predictors():
        predictor.demos = []
    return module


def _drafts_answer(program: Collaboration) -> bool:
    """Whether drafts hold an answer, as those of the formats "direct" and "chain_of_thought" do."""
    drafting = program.draft.predictors()
    return bool(drafting) and program.answer_fields[-1] in signature_of(drafting[-1]).output_fields


def _drafts_as_answers(experiment: _Parts, program: Collaboration) -> Answerer:
    """What the weak model of this program drafts, taken as its answer."""
    if not _drafts_answer(program):
        raise ConfigError(
            'An arm of kind "weak" with weak = "tuned" takes the draft as the answer, and drafts '
            "have no "
            f'"{program.answer_fields[-1]}": use draft = "direct" or "chain_of_thought", or weak '
            '= "sft".'
        )
    note = "its draft is its answer"
    return _of_module(experiment, program.draft.deepcopy(), "weak", program.weak, note=note)


def _rag(experiment: _Parts, rules: ArmRules) -> Answerer:
    program = rag(experiment.program, _retriever(experiment, rules)).bind(strong=experiment.strong)
    return _of_program(experiment, program).on(rules.corpus, rules.passages)


def _grounded(experiment: _Parts, rules: ArmRules) -> Answerer:
    drafting = grounded(experiment.program, _retriever(experiment, rules))
    program = drafting.bind(weak=_state(experiment, rules), strong=experiment.strong)
    return _of_program(experiment, program).on(rules.corpus, rules.passages)


def _retriever(experiment: _Parts, rules: ArmRules) -> Retriever:
    texts = call(str(rules.corpus), given=experiment.config.data.given)
    return Retriever(texts, rules.passages)


def _super_icl(experiment: _Parts, rules: ArmRules) -> Answerer:
    weak = _weak_alone(experiment)
    lm = experiment.answer_sft() if rules.weak == "sft" else _state(experiment, rules)
    bound = experiment.program.bind(weak=lm, strong=experiment.strong)
    weak.set_lm(bound.weak)
    shown = experiment.splits["train"][: rules.shots or SHOTS]
    with keeping(experiment.store):
        program = super_icl(
            bound, shown, weak, samples=rules.samples, temperature=rules.temperature
        )
    return _of_program(experiment, program).on(rules.samples, rules.temperature)


def _collaboration(experiment: _Parts, rules: ArmRules) -> Answerer:
    strong = _strong_of(experiment, rules)
    if rules.weak == "tuned":
        tuned = experiment.final.bind(strong=strong) if rules.transfer else experiment.final
        return _of_program(experiment, tuned, note=_rounds_note(experiment))
    weak = _state(experiment, rules)
    return _of_program(experiment, experiment.program.bind(weak=weak, strong=strong))


def _routed(experiment: _Parts, rules: ArmRules) -> Answerer:
    """By the router that the rules give, or that the run has."""
    program = experiment.best
    if rules.router:
        router = from_recipe(experiment.config, rules.router, Router)
    else:
        router = Router.load(experiment.run)
    routed = Routed(program, router)
    made = _of_program(experiment, program, lambda example: routed(**example.inputs()))
    return made.on(router.model_dump(mode="json", exclude={"about"}))


def _rounds_note(experiment: _Parts) -> str:
    """Which rounds made the tuned model what it is, where not all were accepted."""
    rounds = load_rounds(experiment.store)
    return "" if all(made.accepted for made in rounds) else describe_rounds(rounds)


def _state(experiment: _Parts, rules: ArmRules) -> dspy.LM:
    if rules.weak == "base":
        return experiment.weak
    return experiment.sft() if rules.weak == "sft" else experiment.tune()


def _oracle(experiment: _Parts, rules: ArmRules) -> Answerer:
    name = rules.field or experiment.config.evaluate.oracle
    if not name:
        raise ConfigError(
            'An arm of kind "oracle" needs field = "...", or [evaluate] oracle: which field has '
            "the gold background."
        )
    bound = experiment.program.bind(strong=_strong_of(experiment, rules))
    note = f'given the field "{name}" in the place of a draft'
    return _of_program(experiment, bound, arms.oracle_arm(bound, name), note).on(name)


def _control(experiment: _Parts, rules: ArmRules) -> Answerer:
    name, config = str(rules.control), experiment.config
    if name != "other_draft":
        return _of_program(experiment, experiment.controlled(name), note="control")
    program = experiment.final
    examples = experiment.splits[config.compare.split if config.compare else "test"]
    answering = other_draft_arm(program, examples, config.seed)
    return _of_program(experiment, program, answering, "control").on(name, config.seed)


def _module(experiment: _Parts, rules: ArmRules) -> Answerer:
    module = from_recipe(experiment.config, str(rules.program), dspy.Module)
    if rules.role == "strong":
        return _on_strong(experiment, module)
    lm = experiment.program.bind(weak=experiment.weak).weak
    return _of_module(experiment, module, "weak", lm)


_KINDS: dict[str, Callable[[_Parts, ArmRules], Answerer]] = {
    "alone": _alone,
    "strong": _strong,
    "weak": _weak,
    "self_refine": _self_refine,
    "self_consistency": _self_consistency,
    "rag": _rag,
    "grounded": _grounded,
    "super_icl": _super_icl,
    "collaboration": _collaboration,
    "routed": _routed,
    "oracle": _oracle,
    "control": _control,
    "module": _module,
}


# Controls


def shuffled(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows of pairs with chosen and rejected exchanged in a random half, labelled rows with their
    labels dealt out anew: the same texts, as many of each label, no preference in them."""
    chance, rows = random.Random(seed), [dict(row) for row in rows]
    if rows and "label" in rows[0]:
        labels = chance.sample([row["label"] for row in rows], len(rows))
        return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    for place in chance.sample(range(len(rows)), len(rows) // 2):
        rows[place]["chosen"], rows[place]["rejected"] = (
            rows[place]["rejected"],
            rows[place]["chosen"],
        )
    return rows


def chosen_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of SFT: the chosen drafts of pairs; of labelled rows those that helped."""
    return [
        {"prompt": row["prompt"], "completion": row.get("chosen") or row["completion"]}
        for row in rows
        if row.get("label", True)
    ]


def by_correctness(traces: Iterable[Trace]) -> list[Trace]:
    """The traces, ranked by how right each draft is as an answer instead of by what it does to the
    strong model's.

    Raises:
        PairsError: no draft holds an answer that could be scored, as in the format "knowledge".
    """
    scored = [
        trace if trace.error else replace(trace, influence=trace.draft_score)
        for trace in traces
        if trace.draft_score is not None
    ]
    if not scored:
        raise PairsError(
            "The control by_correctness ranks drafts by their own answers, and these hold none: "
            'it needs draft = "direct" or "chain_of_thought".'
        )
    return scored


def other_draft_arm(
    program: Collaboration, examples: Sequence[dspy.Example], seed: int
) -> arms.Answering:
    """The collaboration with each example's draft replaced by that of another one: the next in a
    random order of ``examples``."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    following = {
        examples[one].id: examples[other]
        for one, other in zip(order, [*order[1:], order[0]], strict=True)
    }

    def answer(example: dspy.Example) -> dspy.Prediction:
        return program.ask_refine(
            program.ask_draft(**following[example.id].inputs()).draft, **example.inputs()
        )

    return answer
