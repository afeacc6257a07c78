"""The arms of [compare]: from a kind and its options to a way of answering, with the models that it
depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dspy

from cowest_dspy.errors import ConfigError
from cowest_dspy.experiment.config import Config, overridden
from cowest_dspy.experiment.controls import other_draft_arm
from cowest_dspy.experiment.experiment import Experiment
from cowest_dspy.experiment.summary import arm_title, tuned_state, with_state
from cowest_dspy.experiment.tables import ArmRules
from cowest_dspy.influence import arms
from cowest_dspy.optimizers.rounds import Round
from cowest_dspy.optimizers.stages import digest
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
from cowest_dspy.report import outcomes_text
from cowest_dspy.store.record import keeping
from cowest_dspy.utils.importing import call

SHOTS = 4
"""Worked examples of SuperICL, where the arm does not say how many."""

_TITLES = {
    "alone": "strong alone",
    "strong": "strong alone",
    "self_refine": "strong alone, self-refine",
    "self_consistency": "strong alone, self-consistency",
    "rag": "strong with retrieved passages (RAG)",
    "grounded": "collaboration, drafts from retrieved passages",
    "super_icl": "SuperICL: strong with weak answers and their confidence",
    "oracle": "ceiling: strong with gold background",
}
_STATES = {"base": "as it came", "sft": "after SFT", "tuned": "after preference tuning"}


@dataclass(frozen=True)
class Answerer:
    """How an arm answers, and what that depends on besides the run's meaning (prompts, demos, model
    ids)."""

    answering: arms.Answering
    depends_on: Any
    note: str = ""
    threads: int = 8


@dataclass
class Variants:
    """The parts of one run under other settings, each made once."""

    base: Experiment
    made: dict[str, Experiment] = field(default_factory=dict)

    def of(self, changes: dict[str, Any]) -> Experiment:
        """The run with these dotted keys changed; the run itself where that changes nothing.

        Raises:
            ConfigError: an unknown key, or a value that cannot be.
        """
        base = self.base.config
        made = {
            key: value for key, value in changes.items() if overridden(base, {key: value}) != base
        }
        if not made:
            return self.base
        config = overridden(base, made)
        name = _folder_name(made, config)
        if name not in self.made:
            self.made[name] = self.base.variant(name, config)
        return self.made[name]


ASIDE: Any = {"tracking": True, "ray": True}
"""What makes no other variant of it: who is told of it, and where it is worked on."""


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
    """What an arm is called: as it says itself, or after what it is. One on the tuned weak model is
    called untuned where no tuning was taken, as far as that is known in ``part``."""
    state = (
        tuned_state(part.store)
        if rules.weak == "tuned" or rules.control == "other_draft"
        else _STATES[rules.weak]
    )
    doubt = state if state.startswith("untuned") else ""
    if rules.title:
        return with_state(rules.title, doubt) if doubt else rules.title
    draft = f", draft = {rules.draft}" if rules.draft else ""
    if rules.kind == "control":
        if rules.control != "other_draft":
            return arm_title(str(rules.control), part.config, part.store) + draft
        return f"control: {doubt or 'tuned'}, with the draft of another example{draft}"
    if rules.kind == "weak":
        return with_state("weak alone", state) + (
            f", {rules.shots} worked examples" if rules.shots else ""
        )
    if rules.kind == "collaboration":
        return with_state("collaboration", state) + draft
    if rules.kind == "module":
        return f"{rules.program}".rpartition("/")[2] + f" on the {rules.role} model"
    more = {
        "strong": rules.style == "chain_of_thought" and ", chain of thought",
        "self_consistency": f", {rules.samples} samples",
    }
    title = _TITLES[rules.kind] + (more.get(rules.kind) or "")
    return with_state(title, doubt) if doubt else title


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


def answerer(experiment: Experiment, rules: ArmRules) -> Answerer:
    """The arm of these rules in a run. Whatever has to be trained for it, is.

    Raises:
        ConfigError: the configuration lacks what the arm needs.
        PairsError: there are too few pairs for a model that has to be tuned.
    """
    if rules.draft and rules.draft != experiment.config.draft:
        raise ConfigError(
            f'An arm with draft = "{rules.draft}" belongs to the variant of that format.'
        )
    return _KINDS[rules.kind](experiment, rules)


def _of_program(
    experiment: Experiment, program: Collaboration, answering: arms.Answering, note: str = ""
) -> Answerer:
    """What a collaboration depends on: its prompts and demos, and its two models."""
    models = sorted(
        {
            predictor.lm.model
            for _, predictor in program.named_predictors()
            if predictor.lm is not None
        }
    )
    threads = experiment.config.at_once("strong")
    return Answerer(answering, [program.dump_state(), models], note, threads)


def _of_module(
    experiment: Experiment, module: dspy.Module, lm: dspy.LM, *, threads: int, note: str = ""
) -> Answerer:
    """What a module by itself depends on, in the prompts' format of the run's program."""
    module.set_lm(lm)
    for _, predictor in module.named_predictors():
        predictor.lm = lm
    unbound = module.deepcopy()
    unbound.set_lm(None)
    answering = arms.module_arm(experiment.program, module)
    return Answerer(
        answering, [type(module).__name__, unbound.dump_state(), lm.model], note, threads
    )


def _alone(experiment: Experiment, rules: ArmRules) -> Answerer:
    bound = experiment.program.bind(strong=experiment.strong)
    return _of_program(
        experiment,
        bound,
        arms.alone_arm(bound),
        "the instructions, demos and room of refining, less the draft",
    )


def _strong(experiment: Experiment, rules: ArmRules) -> Answerer:
    if rules.style == "direct":
        return _alone(experiment, rules)
    return _on_strong(experiment, chain_of_thought(experiment.program))


def _self_refine(experiment: Experiment, rules: ArmRules) -> Answerer:
    return _on_strong(experiment, SelfRefine(experiment.program, rounds=rules.rounds))


def _self_consistency(experiment: Experiment, rules: ArmRules) -> Answerer:
    module = SelfConsistency(
        experiment.program, samples=rules.samples, temperature=rules.temperature
    )
    return _on_strong(experiment, module, [rules.samples, rules.temperature])


def _on_strong(experiment: Experiment, module: dspy.Module, more: Any = None) -> Answerer:
    lm = experiment.program.bind(strong=experiment.strong).strong
    made = _of_module(experiment, module, lm, threads=experiment.config.at_once("strong"))
    return Answerer(made.answering, [made.depends_on, more], made.note, made.threads)


def _weak(experiment: Experiment, rules: ArmRules) -> Answerer:
    """The weak model by itself: with the recipe's own program, otherwise with the task as the
    strong model is given it."""
    threads = experiment.config.at_once("weak")
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
    reference = experiment.config.evaluate.weak
    module: dspy.Module = call(reference) if reference else _bare(experiment.program)
    if rules.shots:
        module = few_shot(module, experiment.splits["train"], rules.shots, experiment.config.seed)
    lm = experiment.weak if rules.weak == "base" else experiment.answer_sft()
    return _of_module(experiment, module, experiment.program.bind(weak=lm).weak, threads=threads)


def _bare(program: Collaboration) -> dspy.Module:
    module = program.alone.module.deepcopy()
    for _, predictor in module.named_predictors():
        predictor.demos = []
    return module


def _drafts_answer(program: Collaboration) -> bool:
    """Whether drafts hold an answer, as those of the formats "direct" and "chain_of_thought" do."""
    drafting = program.draft.predictors()
    return bool(drafting) and program.answer_fields[-1] in signature_of(drafting[-1]).output_fields


def _drafts_as_answers(experiment: Experiment, program: Collaboration) -> Answerer:
    """What the weak model of this program drafts, taken as its answer."""
    if not _drafts_answer(program):
        raise ConfigError(
            'An arm of kind "weak" with weak = "tuned" takes the draft as the answer, and drafts '
            "have no "
            f'"{program.answer_fields[-1]}": use draft = "direct" or "chain_of_thought", or weak '
            '= "sft".'
        )
    module = program.draft.deepcopy()
    return _of_module(
        experiment,
        module,
        program.weak,
        threads=experiment.config.at_once("weak"),
        note="its draft is its answer",
    )


def _rag(experiment: Experiment, rules: ArmRules) -> Answerer:
    program = rag(experiment.program, _retriever(experiment, rules)).bind(strong=experiment.strong)
    made = _of_program(experiment, program, arms.collaboration_arm(program))
    return Answerer(
        made.answering, [made.depends_on, rules.corpus, rules.passages], made.note, made.threads
    )


def _grounded(experiment: Experiment, rules: ArmRules) -> Answerer:
    drafting = grounded(experiment.program, _retriever(experiment, rules))
    program = drafting.bind(weak=_state(experiment, rules), strong=experiment.strong)
    made = _of_program(experiment, program, arms.collaboration_arm(program))
    return Answerer(
        made.answering, [made.depends_on, rules.corpus, rules.passages], made.note, made.threads
    )


def _retriever(experiment: Experiment, rules: ArmRules) -> Retriever:
    data = experiment.config.data
    return Retriever(
        call(str(rules.corpus), given={"seed": data.seed, "rows": data.rows}), rules.passages
    )


def _super_icl(experiment: Experiment, rules: ArmRules) -> Answerer:
    reference = experiment.config.evaluate.weak
    weak: dspy.Module = call(reference) if reference else _bare(experiment.program)
    lm = (
        experiment.weak
        if rules.weak == "base"
        else experiment.answer_sft()
        if rules.weak == "sft"
        else experiment.tune()
    )
    bound = experiment.program.bind(weak=lm, strong=experiment.strong)
    weak.set_lm(bound.weak)
    shown = experiment.splits["train"][: rules.shots or SHOTS]
    with keeping(experiment.store):
        program = super_icl(
            bound, shown, weak, samples=rules.samples, temperature=rules.temperature
        )
    made = _of_program(experiment, program, arms.collaboration_arm(program))
    return Answerer(
        made.answering, [made.depends_on, rules.samples, rules.temperature], made.note, made.threads
    )


def _collaboration(experiment: Experiment, rules: ArmRules) -> Answerer:
    program = experiment.final if rules.weak == "tuned" else None
    bound = program or experiment.program.bind(
        weak=_state(experiment, rules), strong=experiment.strong
    )
    return _of_program(
        experiment,
        bound,
        arms.collaboration_arm(bound),
        _rounds_note(experiment) if program else "",
    )


def _rounds_note(experiment: Experiment) -> str:
    """Which rounds made the tuned model what it is, where not all were accepted."""
    rounds = [Round.from_dict(record) for record in experiment.store.records("round").values()]
    return "" if all(made.accepted for made in rounds) else outcomes_text(rounds)


def _state(experiment: Experiment, rules: ArmRules) -> dspy.LM:
    return (
        experiment.weak
        if rules.weak == "base"
        else experiment.sft()
        if rules.weak == "sft"
        else experiment.tune()
    )


def _oracle(experiment: Experiment, rules: ArmRules) -> Answerer:
    name = rules.field or experiment.config.evaluate.oracle
    if not name:
        raise ConfigError(
            'An arm of kind "oracle" needs field = "...", or [evaluate] oracle: which field has '
            "the gold background."
        )
    bound = experiment.program.bind(strong=experiment.strong)
    made = _of_program(
        experiment,
        bound,
        arms.oracle_arm(bound, name),
        f'given the field "{name}" in the place of a draft',
    )
    return Answerer(made.answering, [made.depends_on, name], made.note, made.threads)


def _control(experiment: Experiment, rules: ArmRules) -> Answerer:
    name = str(rules.control)
    if name == "other_draft":
        program = experiment.final
        examples = experiment.splits[
            experiment.config.compare.split if experiment.config.compare else "test"
        ]
        made = _of_program(
            experiment, program, other_draft_arm(program, examples, experiment.config.seed)
        )
        return Answerer(
            made.answering, [made.depends_on, name, experiment.config.seed], "control", made.threads
        )
    program = experiment.controlled(name)
    made = _of_program(experiment, program, arms.collaboration_arm(program), "control")
    return Answerer(made.answering, made.depends_on, "control", made.threads)


def _module(experiment: Experiment, rules: ArmRules) -> Answerer:
    module = call(str(rules.program))
    if not isinstance(module, dspy.Module):
        raise ConfigError(
            f"{rules.program} gave a {type(module).__name__}: a function that returns a "
            "dspy.Module is expected."
        )
    if rules.role == "strong":
        return _on_strong(experiment, module)
    lm = experiment.program.bind(weak=experiment.weak).weak
    return _of_module(experiment, module, lm, threads=experiment.config.at_once("weak"))


_KINDS: dict[str, Callable[[Experiment, ArmRules], Answerer]] = {
    "alone": _alone,
    "strong": _strong,
    "weak": _weak,
    "self_refine": _self_refine,
    "self_consistency": _self_consistency,
    "rag": _rag,
    "grounded": _grounded,
    "super_icl": _super_icl,
    "collaboration": _collaboration,
    "oracle": _oracle,
    "control": _control,
    "module": _module,
}
