"""Collaboration: a weak model drafts, a strong model refines, and the strong model alone is what
that is measured against.

    program = Collaboration("question -> answer", draft="knowledge")
    program = Collaboration(draft=dspy.Predict(Draft), refine=dspy.Predict(Refine))
    together = program.bind(weak=weak, strong=strong)
    together(question="...")                             # Prediction(answer=..., draft=...)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import dspy

from cowest_dspy.errors import ProgramError, masked, nearest
from cowest_dspy.program.adapters import LineAdapter, escape, escaping, labelled_lines
from cowest_dspy.store.call_context import Call, listening, note
from cowest_dspy.store.record import failure_in, recorded
from cowest_dspy.utils import notebook

DraftFormat = Literal["direct", "knowledge", "chain_of_thought"]
"""What a draft holds: an answer, background for one, or reasoning and an answer."""

DRAFT_FIELD = "background"
LONGEST_DRAFT = 4000
FAILED_CALL = "_failed_call"
"""The attribute of a prediction that says why a call of it was no whole answer; None, or missing,
where all were."""

_DRAFT_TASKS: dict[str, str] = {
    "direct": "Answer as well as you can.",
    "knowledge": "Write down what you know that helps with this. Do not answer.",
    "chain_of_thought": "Think step by step, then answer.",
}


class Counterfactual(dspy.Module):
    """The strong model alone: refine without the draft. Closed to optimisers, which would otherwise
    change the measure.

    Args:
        refine: the module that takes the draft; it is copied.
        draft_field: its input that carries the draft. It leaves the signatures, the demos, and the
            lists of fields in which DSPy writes instructions: "Given the fields `question`,
            `hints`" becomes "Given the fields `question`".
        instructions: in the place of refine's.

    Raises:
        ProgramError: refine takes nothing but the draft, or several of its predictors take it and
            there is one text for them all.
    """

    def __init__(
        self, refine: dspy.Module, draft_field: str, instructions: str | None = None
    ) -> None:
        super().__init__()
        self.module = refine.deepcopy()
        named = list(self.module.named_predictors())
        taking = [name for name, one in named if draft_field in signature_of(one).input_fields]
        if instructions is not None and len(taking) > 1:
            raise ProgramError(
                f"alone_instructions is one text, and {len(taking)} predictors of refine take the "
                f"draft ({', '.join(taking)}). Word their instructions so that they hold with and "
                "without a draft."
            )
        for name, predictor in named:
            signature = _without_field(signature_of(predictor), draft_field)
            if instructions is not None and name in taking:
                signature = signature.with_instructions(instructions)
            predictor.signature = signature
            predictor.demos = [_without(demo, draft_field) for demo in predictor.demos]
        if taking and not any(signature_of(one).input_fields for _, one in named):
            raise ProgramError(
                f'refine takes nothing but the draft ("{draft_field}"): without one, the strong '
                "model would be asked nothing. Give refine the question too, as in "
                f'"question, {draft_field} -> answer".'
            )
        self._compiled = True

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The strong model's answer to the inputs, no draft given."""
        return self.module(**inputs)


class Collaboration(dspy.Module):
    """A program of two models: ``draft`` runs on the weak one, ``refine`` on the strong one.

    Args:
        signature: the task, such as ``"question -> answer"`` or a ``dspy.Signature``; its
            instructions are shared by draft and refine. Leave it out when both modules are given.
        draft: a draft format (``"direct"``: an answer, ``"knowledge"``: what is known about it,
            ``"chain_of_thought"``: reasoning and answer) or any ``dspy.Module``.
        refine: any ``dspy.Module`` with one input more than the draft has; by default a
            ``dspy.Predict`` of the task.
        draft_field: the input of refine that carries the draft, where it cannot be told from the
            signatures; with a ``signature``, the name of that input, by default ``"background"``. A
            drafter that asks no model, or whose prediction says more than its draft, names the
            fields of its draft as ``output_names``.
        demos: worked examples for refine; alone gets the same without their draft.
        adapter: the adapter of all prompts; by default ``dspy.settings.adapter``, otherwise
            :class:`LineAdapter`.
        alone_instructions: the instructions of the strong model alone, where those of refine speak
            of the draft; by default refine's.

    The strong model alone has the same prompt without a draft: refine's instructions, demos and
    settings. Lists of fields that DSPy writes by itself, as for ``"question, hints -> answer"``,
    lose the draft's field; instructions of your own that name it are a ``UserWarning`` with the
    sentence, since alone would be told of something that it is not given.

    Inputs, demos and the draft reach a model as data, with a draft and without one alike: what
    would be a token of a chat template or a mark of the adapter in them is made harmless. A draft
    has no control characters, and at most 4,000 characters.

    Raises:
        ProgramError: neither a signature nor both modules; an unknown format; it is not clear which
            input of refine carries the draft; or refine takes nothing else.
    """

    def __init__(
        self,
        signature: str | type[dspy.Signature] | None = None,
        *,
        draft: DraftFormat | dspy.Module = "knowledge",
        refine: dspy.Module | None = None,
        draft_field: str | None = None,
        demos: list[dspy.Example] | None = None,
        adapter: dspy.Adapter | None = None,
        alone_instructions: str | None = None,
    ) -> None:
        super().__init__()
        task = dspy.ensure_signature(signature) if signature is not None else None
        if task is None and (isinstance(draft, str) or refine is None):
            raise ProgramError(
                'Give a signature, such as Collaboration("question -> answer"), or both draft= '
                "and refine= modules."
            )
        new = draft_field or DRAFT_FIELD
        if task is not None and new in task.fields and (isinstance(draft, str) or refine is None):
            raise ProgramError(
                f'The task has a field "{new}" of its own; call the draft otherwise: '
                'Collaboration(..., draft_field="notes").'
            )
        self.draft: dspy.Module = _drafter(task, draft, new) if isinstance(draft, str) else draft
        self.refine: dspy.Module = refine or dspy.Predict(
            cast("type[dspy.Signature]", task).append(new, dspy.InputField(), str)
        )
        if demos is not None:
            for _, predictor in self.refine.named_predictors():
                predictor.demos = list(demos)
        self.draft_field = _draft_field(self.draft, self.refine, draft_field)
        self.adapter = adapter
        self.alone_instructions, self.declared_instructions = (
            alone_instructions,
            _texts(self.refine),
        )
        self.alone = Counterfactual(self.refine, self.draft_field, alone_instructions)
        if alone_instructions is None:
            _warn_of_draft(self.alone, self.draft_field, stacklevel=4)

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Draft, then refine. The prediction has refine's outputs and ``draft``, the text that the
        strong model was given."""
        step: Step | None = dspy.settings.get(_ANSWERING_BY)
        if step is not None:
            return step(self, inputs)
        calls: list[Call] = []
        try:
            with listening() as calls:
                prediction = self.ask_refine(self.ask_draft(**inputs).draft, **inputs)
        finally:
            note(calls)  # for what listens outside
        setattr(prediction, FAILED_CALL, failure_in(calls))
        return prediction

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """Draft, then refine, as :meth:`forward` does: ``await program.acall(question="...")``.

        Both models are awaited. What has only synchronous calls waits in a thread instead
        (``dspy.asyncify``): a store, an engine, a module of your own without ``aforward``.
        """
        calls: list[Call] = []
        try:
            with listening() as calls, prompt_format(self.adapter):
                draft = self._with_draft_text(await _acall(self.draft, **inputs)).draft
                prediction = await _acall(self.refine, **inputs, **{self.draft_field: draft})
        finally:
            note(calls)
        prediction["draft"] = draft
        setattr(prediction, FAILED_CALL, failure_in(calls))
        return prediction

    def ask_draft(self, **inputs: Any) -> dspy.Prediction:
        """The weak model's outputs by field, and as ``draft`` the text that the strong model will
        see of them."""
        with prompt_format(self.adapter):
            return self._with_draft_text(self.draft(**inputs))

    def _with_draft_text(self, prediction: dspy.Prediction) -> dspy.Prediction:
        """A drafter's outputs by field, and ``draft``."""
        outputs = outputs_of(prediction)
        names = _declared(self.draft) or tuple(outputs)
        shown = dspy.Prediction(**{name: outputs[name] for name in names if name in outputs})
        return dspy.Prediction(
            **{**outputs, "draft": sanitize_draft(draft_text(shown, self.draft_field))}
        )

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """The fields of an answer: the outputs of refine's last predictor. A draft that has them
        all can be scored as an answer."""
        return tuple(signature_of(self.refine.predictors()[-1]).output_fields)

    @property
    def output_types(self) -> dict[str, Any]:
        """The types of refine's outputs by name, by which an answer that was kept becomes again
        what it was."""
        predictors = [signature_of(one) for one in self.refine.predictors()]
        return {
            name: field.annotation
            for signature in predictors
            for name, field in signature.output_fields.items()
        }

    def holds_answer(self, outputs: Mapping[str, Any]) -> bool:
        """Whether a draft's outputs have all fields of an answer."""
        return set(self.answer_fields) <= outputs.keys()

    def ask_refine(self, draft: str, **inputs: Any) -> dspy.Prediction:
        """The strong model's answer to the inputs and a draft."""
        with prompt_format(self.adapter):
            prediction = self.refine(**inputs, **{self.draft_field: draft})
        prediction["draft"] = draft
        return prediction

    def ask_alone(self, **inputs: Any) -> dspy.Prediction:
        """The strong model's answer to the inputs without any draft."""
        with prompt_format(self.adapter):
            return self.alone(**inputs)

    def with_fresh_baseline(self) -> Collaboration:
        """A copy whose alone is made anew from refine as it is now: the strong model alone with the
        prompts that were found. ``alone_instructions`` stay where no others were found; found ones
        that name the draft's field are a ``UserWarning``."""
        made = self.deepcopy()
        same = _texts(made.refine) == made.declared_instructions
        instructions = made.alone_instructions if same else None
        made.alone = Counterfactual(made.refine, made.draft_field, instructions)
        if not same:
            _warn_of_draft(made.alone, made.draft_field, stacklevel=3)
        return made

    def ask_module(self, module: dspy.Module, **inputs: Any) -> dspy.Prediction:
        """The answer of any other module, in the prompt format of this program."""
        with prompt_format(self.adapter):
            return module(**inputs)

    def bind(
        self, *, weak: dspy.LM | str | None = None, strong: dspy.LM | str | None = None
    ) -> Collaboration:
        """A copy of the program on these LMs; what is not given stays as it is. The calls of bound
        LMs are recorded.

        Args:
            weak: the LM of draft, or the id of a ``dspy.LM``, such as ``"openai/gpt-4.1-mini"``.
            strong: the LM of refine and alone, or an id.

        Raises:
            ProgramError: something else was given.
        """
        bound = self.deepcopy()
        bound.set_lms(weak=weak, strong=strong)
        return bound

    def set_lms(
        self, *, weak: dspy.LM | str | None = None, strong: dspy.LM | str | None = None
    ) -> None:
        """Put the program itself on these LMs, as :meth:`bind` puts a copy."""
        if weak is not None:
            self.draft.set_lm(_recorded("weak", weak))
        if strong is not None:
            lm = _recorded("strong", strong)
            self.refine.set_lm(lm)
            self.alone.module.set_lm(lm)

    def get_lm(self) -> dspy.LM | None:
        """The LM whose samples differ: the weak model's, or the strong one's where the draft asks
        no model. DSPy's samplers (SIMBA, BestOfN, Refine) ask for it and vary it."""
        return cast(
            "dspy.LM | None", (self.draft if self.draft.predictors() else self.refine).get_lm()
        )

    def set_lm(self, lm: dspy.LM | None) -> None:
        """Puts another LM in the place of the one that :meth:`get_lm` names, so that a sampler
        varies the drafts and leaves the strong model what it was. A program whose models are not
        told apart yet gets it everywhere; :meth:`bind` tells them apart.
        """
        before = self.get_lm()
        for _, predictor in self.named_predictors():
            if predictor.lm is before:
                predictor.lm = lm

    def reset_copy(self) -> Collaboration:
        """DSPy's: a copy without demonstrations. It stays on its LMs, so that a few-shot optimiser
        can run it."""
        made: Collaboration = super().reset_copy()
        for now, before in zip(made.predictors(), self.predictors(), strict=True):
            now.lm = before.lm
        return made

    @property
    def weak(self) -> dspy.LM:
        """The LM of draft. Raises ProgramError when the program is not bound, or when its draft
        asks no model."""
        if not self.draft.predictors():
            raise ProgramError(
                f"The draft ({type(self.draft).__name__}) asks no model: no weak model's drafts "
                "can be sampled or tuned. "
                "Such a program can answer and be scored; to tune a drafter that reads passages, "
                "use Grounded(retriever, drafter)."
            )
        return _lm_of(self.draft, "weak")

    @property
    def strong(self) -> dspy.LM:
        """The LM of refine and alone. Raises ProgramError when the program is not bound."""
        return _lm_of(self.refine, "strong")

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The program's state without any LM: prompts and demos are saved, models are bound when it
        is loaded again."""
        unbound = self.deepcopy()
        for _, predictor in unbound.named_predictors():
            predictor.lm = None
        return super(Collaboration, unbound).dump_state(json_mode=json_mode)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - DSPy's is of literal text
        models = " -> ".join(_describe_lm(module) for module in (self.draft, self.refine))
        return f"Collaboration({models}, draft {_form(self.draft)}, refine {_form(self.refine)})"

    def _repr_html_(self) -> str:
        """The program in a notebook: its two models, what each is asked for, and what tuning made
        of it, where it was tuned."""
        parts = (
            ("draft", "weak", self.draft),
            ("refine", "strong", self.refine),
            ("alone", "strong", self.alone.module),
        )
        rows = [
            (
                name,
                role,
                notebook.format_text(_describe_lm(module)),
                notebook.format_text(_form(module)),
                *_instructions(module),
            )
            for name, role, module in parts
        ]
        adapter = type(prompt_adapter(self.adapter)).__name__
        history: list[Any] = [getattr(self, name, ()) for name in ("rounds", "steps")]
        return notebook.view(
            "Collaboration",
            notebook.table(
                ("step", "role", "model", "fields", "instructions", "examples"), rows, texts=5
            ),
            f"the draft goes into refine's input {self.draft_field!r}; prompts: {adapter}",
        ) + "".join(one._repr_html_() for one in history if hasattr(one, "_repr_html_"))


Step = Callable[[Collaboration, dict[str, Any]], dspy.Prediction]
"""Answers for a Collaboration: gets it and the inputs that it was called with."""
_ANSWERING_BY = "cowest_answering_by"


@contextmanager
def answering_by(step: Step | None) -> Iterator[None]:
    """Have a Collaboration that is called inside this context, in whatever module, answer by
    ``step``; None: by itself."""
    with dspy.context(**{_ANSWERING_BY: step}):
        yield


@contextmanager
def prompt_format(adapter: dspy.Adapter | None) -> Iterator[None]:
    """The prompt format of what is asked inside: ``adapter``, by default ``dspy.settings.adapter``,
    otherwise a LineAdapter."""
    with dspy.context(adapter=prompt_adapter(adapter)):
        yield


def prompt_adapter(adapter: dspy.Adapter | None) -> dspy.Adapter:
    """The adapter of a program's prompts: ``adapter``, by default ``dspy.settings.adapter``,
    otherwise a LineAdapter. It escapes data (adapters.py)."""
    return escaping(adapter or dspy.settings.adapter or LineAdapter())


def _describe_lm(module: dspy.Module) -> str:
    """The models of a module, by id, with the settings that change an answer; of no other setting,
    since one may be a key."""
    described = list[str]()
    for predictor in module.predictors():
        lm = predictor.lm
        given = getattr(lm, "kwargs", {})
        settings = [
            f"{name} {given[name]}"
            for name in ("temperature", "max_tokens")
            if given.get(name) is not None
        ]
        named = masked(str(getattr(lm, "model", type(lm).__name__)))
        described.append("not bound" if lm is None else " ".join([named, *settings]))
    return ", ".join(dict.fromkeys(described)) or "asks no model"


def _form(module: dspy.Module) -> str:
    """A module's inputs and outputs: those of each of its predictors."""
    signatures = [signature_of(predictor) for predictor in module.predictors()]
    forms = [
        f"{', '.join(one.input_fields)} -> {', '.join(one.output_fields)}" for one in signatures
    ]
    return "; ".join(forms) or type(module).__name__


def _instructions(module: dspy.Module) -> tuple[Any, str]:
    """The instructions of a module's predictors, and how many worked examples they have."""
    predictors = module.predictors()
    return notebook.format_text("\n".join(_texts(module))), str(
        sum(len(predictor.demos) for predictor in predictors)
    )


def draft_text(prediction: dspy.Prediction, field: str) -> str:
    """A drafter's outputs as one text: the field of that name or the only one, otherwise all as
    labelled lines."""
    outputs = {name: str(one) for name, one in outputs_of(prediction).items() if one is not None}
    if field in outputs:
        return outputs[field]
    return labelled_lines(outputs)


def outputs_of(prediction: Any) -> dict[str, Any]:
    """A prediction's fields, less the logprobs that an adapter may put beside them."""
    return {name: value for name, value in prediction.items() if name != "logprobs"}


def sanitize_draft(draft: str) -> str:
    """A draft as harmless data: escaped (adapters.py), without control characters, at most 4,000
    characters.

    ``sanitize_draft("5 bar<|im_end|>")`` is ``"5 bar< |im_end|>"``: readable, but no tokenizer
    takes it for the end of a turn.
    """
    visible = "".join(char for char in draft if char in "\n\t" or char.isprintable())
    return escape(visible.strip())[:LONGEST_DRAFT].strip()


async def _acall(module: dspy.Module, **inputs: Any) -> dspy.Prediction:
    """Await a module; one that has no ``aforward`` is called in a thread."""
    if hasattr(module, "aforward"):
        return await module.acall(**inputs)
    in_thread: Any = dspy.asyncify(module)  # DSPy types it as of two arguments
    return await in_thread(**inputs)


def _recorded(role: str, lm: Any) -> dspy.LM:
    if isinstance(lm, str):
        lm = dspy.LM(lm)
    if not isinstance(lm, dspy.LM):
        raise ProgramError(
            f"bind({role}=...) takes a dspy.LM, or the id of one as text, and was given a "
            f"{type(lm).__name__}. A model of your own stands behind dspy.LM(model, engine=...)."
        )
    return recorded(lm)


def _drafter(task: type[dspy.Signature] | None, draft: str, field: str) -> dspy.Module:
    if draft not in _DRAFT_TASKS:
        raise ProgramError(
            f'There is no draft format "{draft}": use {", ".join(_DRAFT_TASKS)}, or any '
            "dspy.Module."
        )
    signature = cast("type[dspy.Signature]", task).with_instructions(_DRAFT_TASKS[draft])
    if draft == "knowledge":
        for name in list(signature.output_fields):
            signature = signature.delete(name)
        return dspy.Predict(signature.append(field, dspy.OutputField(), str))
    return (
        dspy.ChainOfThought(signature) if draft == "chain_of_thought" else dspy.Predict(signature)
    )


def _draft_field(draft: dspy.Module, refine: dspy.Module, named: str | None) -> str:
    given = {
        name
        for _, predictor in draft.named_predictors()
        for name in signature_of(predictor).input_fields
    }
    made = {
        name
        for _, predictor in draft.named_predictors()
        for name in signature_of(predictor).output_fields
    }
    made |= set(_declared(draft))
    wanted = [
        name
        for _, predictor in refine.named_predictors()
        for name in signature_of(predictor).input_fields
    ]
    if named is not None:
        if named not in wanted:
            raise ProgramError(
                f'draft_field is "{named}", but refine takes {wanted}.{nearest(named, wanted)}'
            )
        return named
    new = list(dict.fromkeys(name for name in wanted if name not in given))
    carrying = [name for name in new if name in made] or new
    if len(carrying) != 1:
        raise ProgramError(
            "It is not clear which input of refine carries the draft: draft takes "
            f"{sorted(given)}, refine takes {wanted}. "
            "Refine needs exactly one input that the draft does not take; or name it: "
            "Collaboration(..., draft_field=...)."
        )
    return carrying[0]


def _declared(drafter: dspy.Module) -> tuple[str, ...]:
    """The fields of a prediction that are the draft, where the drafter says so."""
    return tuple(getattr(drafter, "output_names", ()))


def _without_field(signature: type[dspy.Signature], field: str) -> type[dspy.Signature]:
    """The signature without a field, and its instructions without the field where they list fields
    as DSPy's own do: with "`" around each and commas in between."""
    mark = re.escape(f"`{field}`")
    instructions = re.sub(rf"{mark}, |, {mark}", "", signature.instructions)
    return signature.delete(field).with_instructions(instructions)


def _warn_of_draft(alone: Counterfactual, field: str, *, stacklevel: int) -> None:
    """Warn of each sentence that tells the strong model alone of a draft: one with the name of the
    draft's field, or with "the draft"."""
    name = re.escape(field).replace("_", "[_ ]")
    sentence = re.compile(rf"[^.!?\n]*\b(?:{name}|(?:the|this) drafts?)\b[^.!?\n]*[.!?]?", re.I)
    for text in _texts(alone.module):
        for found in sentence.finditer(text):
            warnings.warn(
                f'The strong model alone is not given "{field}", and its instructions say: '
                f'"{found.group().strip()}" Word them so that they hold with and without a draft, '
                'or give alone its own: Collaboration(..., alone_instructions="...").',
                stacklevel=stacklevel,
            )


def _texts(module: dspy.Module) -> tuple[str, ...]:
    """The instructions of a module's predictors."""
    return tuple(signature_of(predictor).instructions for predictor in module.predictors())


def signature_of(predictor: dspy.Predict) -> type[dspy.Signature]:
    """A predictor's signature; DSPy leaves its type open."""
    return cast("type[dspy.Signature]", predictor.signature)


def _without(demo: Any, field: str) -> dspy.Example:
    return dspy.Example(**{key: value for key, value in dict(demo).items() if key != field})


def _lm_of(module: dspy.Module, role: str) -> dspy.LM:
    lms = {id(predictor.lm): predictor.lm for _, predictor in module.named_predictors()}
    if len(lms) != 1 or None in lms.values():
        raise ProgramError(
            f"The program is not bound: call program.bind({role}=dspy.LM(...)) first."
        )
    return cast(dspy.LM, next(iter(lms.values())))
