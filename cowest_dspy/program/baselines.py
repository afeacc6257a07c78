"""Other ways to answer, to compare a collaboration with; each a ``dspy.Module`` of ordinary
predictors.

    chain_of_thought(program)                    # reasoning before the answer
    few_shot(program, examples, k=8, seed=0)     # labelled examples before the question
    SelfRefine(program)                          # an answer, feedback on it, a better answer
    rag(program, Retriever(passages, k=3))       # the strong model reads passages, not a draft
    grounded(program, Retriever(passages))       # the weak model reads passages and drafts

A baseline is made of a task: a :class:`Collaboration` (its strong model alone, with its
instructions, demos, LM and adapter), any module, or a signature. Votes over several samples are in
voting.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import dspy

from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.program.adapters import LineAdapter, label, labelled_lines
from cowest_dspy.program.collaboration import (
    DRAFT_FIELD,
    LONGEST_DRAFT,
    Collaboration,
    draft_text,
    outputs_of,
    prompt_adapter,
    prompt_format,
    sanitize_draft,
    signature_of,
)
from cowest_dspy.utils.extras import check_extra

Task: TypeAlias = "Collaboration | dspy.Module | str | type[dspy.Signature]"
REASONING = "reasoning"


class Baseline(dspy.Module):
    """One way to answer a task with one model, in the prompt format of the program that the task is
    of.

    Args:
        task: a :class:`Collaboration`, of which the strong model alone is taken and never the
            draft; a module; or a signature. The module is copied, with its LMs and demos.

    ``module`` answers the task; ``adapter`` is that of all prompts, by default
    ``dspy.settings.adapter``, otherwise :class:`LineAdapter`.

    Raises:
        ProgramError: the module has no predictor.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.adapter: dspy.Adapter | None = (
            task.adapter if isinstance(task, Collaboration | Baseline) else None
        )
        self.module: dspy.Module = _module(task)
        if not predictors_of(self.module):
            raise ProgramError(
                f"{type(self).__name__}: a {type(self.module).__name__} asks no model; give a "
                "module with a predictor."
            )

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The answer to the inputs."""
        with prompt_format(self.adapter):
            return self.answer(**inputs)

    def answer(self, **inputs: Any) -> dspy.Prediction:
        """The answer, asked for in the prompt format of the caller."""
        return self.module(**inputs)

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """Prompts and demos without any LM, as of a :class:`Collaboration`."""
        unbound = self.deepcopy()
        for predictor in predictors_of(unbound):
            predictor.lm = None
        return super(Baseline, unbound).dump_state(json_mode=json_mode)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The fields of the answer, without what is said of how it was found."""
        return tuple(signature_of(predictors_of(self.module)[-1]).output_fields)


def chain_of_thought(task: Task) -> Baseline:
    """The task with a reasoning before its first output (Wei et al. 2022), as
    ``dspy.ChainOfThought`` asks for it.

    Its instructions stay, and demos that have a ``reasoning``. One without would be shown with
    DSPy's note that it is "not supplied", and small models write that note instead of reasoning: it
    is left out. Demos with a reasoning also come from ``few_shot(chain_of_thought(task),
    examples)``. A task that has such an output already stays as it is.

    In the format of a :class:`LineAdapter`, which says nothing of lines by itself, one sentence
    about them follows the instructions.
    """
    made = Baseline(task)
    predictor = predictors_of(made.module)[-1]
    signature = signature_of(predictor)
    if REASONING in signature.output_fields:
        return made
    signature = signature.prepend(REASONING, dspy.OutputField(desc="${reasoning}"), str)
    if isinstance(prompt_adapter(made.adapter), LineAdapter):
        lines = ", ".join(f'"{label(name)}: ..."' for name in signature.output_fields)
        signature = signature.with_instructions(
            f"{signature.instructions.strip()}\nThink step by step first. Write lines: {lines}."
        )
    predictor.signature = signature
    predictor.demos = [demo for demo in predictor.demos if dict(demo).get(REASONING)]
    return made


def few_shot(task: Task, examples: Sequence[dspy.Example], k: int = 8, seed: int = 0) -> Baseline:
    """The task with ``k`` labelled examples as demos, drawn by ``seed``; with all of them if there
    are fewer.

    Demos have the fields of a predictor's signature and nothing else of an example; a predictor
    whose outputs no example has keeps its own. Of a :class:`Collaboration` it is the strong model
    alone; a module is copied.

    Raises:
        DataError: some examples, or all of them, have none of the outputs, so that they show
            nothing.
        ProgramError: ``k`` is negative.
    """
    if k < 0:
        raise ProgramError(f"few_shot: k is {k}; it is the number of demos, 0 or more.")
    made = task.deepcopy() if isinstance(task, Baseline) else Baseline(task)
    chosen = random.Random(seed).sample(list(examples), min(k, len(examples)))
    last = predictors_of(made)[-1]
    for predictor in predictors_of(made):
        signature = signature_of(predictor)
        if predictor is last or any(
            name in example for name in signature.output_fields for example in chosen
        ):
            predictor.demos = [demo_of(signature, example) for example in chosen]
    return made


def demo_of(signature: type[dspy.Signature], values: Any) -> dspy.Example:
    """The fields of a signature that ``values`` has, as a demo.

    Raises:
        DataError: it has none of the outputs.
    """
    shown = {name: values[name] for name in signature.fields if name in values}
    if not shown.keys() & signature.output_fields.keys():
        raise DataError(
            f"Example {values.get('id', '?')} has none of the outputs "
            f"{list(signature.output_fields)}: it cannot be a demo."
        )
    return dspy.Example(**shown).with_inputs(
        *(name for name in shown if name in signature.input_fields)
    )


def predictors_of(module: dspy.Module) -> list[dspy.Predict]:
    """Every predictor of a module: those that DSPy names, in its order, then those in parts that
    are closed to optimisers."""
    parts = [*module.predictors(), *(part for _, part in module.named_sub_modules(dspy.Predict))]
    return list({id(part): cast(dspy.Predict, part) for part in parts}.values())


def answer_of(module: dspy.Module, prediction: dspy.Prediction) -> Any:
    """The value of the answer: of the last output of the module's last predictor, or the last that
    the prediction has."""
    values = outputs_of(prediction)
    last = next(reversed(signature_of(predictors_of(module)[-1]).output_fields))
    return values[last] if last in values else next(reversed(values.values()), None)


def _module(task: Task) -> dspy.Module:
    if isinstance(task, Collaboration):
        return task.alone.module.deepcopy()
    return task.deepcopy() if isinstance(task, dspy.Module) else dspy.Predict(task)


ATTEMPT, ATTEMPTS, FEEDBACK = "attempt", "attempts", "feedback"

NOTHING = "Nothing is wrong with it."
_CRITICISE = (
    "An attempt at this task is given. Say what is wrong with it and how to mend it, or "
    "that nothing is. Do not answer anew."
)
_AGAIN = (
    "Attempts at this task and feedback on them are given. Answer once more, better; keep "
    "what is right."
)


class SelfRefine(Baseline):
    """An answer, feedback on it, and a refined answer, all by the same LM (Madaan et al. 2023,
    "Self-Refine: Iterative Refinement with Self-Feedback").

    Args:
        task: as for :class:`Baseline`. It makes the first answer; the refined one has the outputs
            of its last predictor.
        rounds: how often feedback is given and the answer refined, 1 or more. A question costs the
            calls of the task and two more a round; it never stops early. As in the paper, a
            refinement sees all earlier attempts and their feedback.

    ``criticise`` and ``again`` are ordinary predictors with the instructions of the task and a
    sentence of their own; where the task is one predictor, ``again`` has its demos, each with its
    own answer as the attempt. The prediction has, before the fields of the answer, ``attempts``:
    the earlier attempts and the feedback on them, as text.

    Raises:
        ProgramError: ``rounds`` is below 1, or the task has a field called attempt, attempts or
            feedback.
    """

    def __init__(self, task: Task, rounds: int = 1) -> None:
        super().__init__(task)
        if rounds < 1:
            raise ProgramError(f"SelfRefine: rounds is {rounds} and must be 1 or more.")
        self.rounds = rounds
        predictors = predictors_of(self.module)
        first, last = predictors[0], predictors[-1]
        inputs, outputs = _task_inputs(predictors), _fields_of(signature_of(last).output_fields)
        taken = {ATTEMPT, ATTEMPTS, FEEDBACK} & (inputs.keys() | outputs.keys())
        if taken:
            raise ProgramError(
                f"SelfRefine: the task has fields {sorted(taken)}, which it needs for itself; "
                "call them otherwise."
            )
        task_says = signature_of(last if len(predictors) == 1 else first).instructions.strip()
        criticising = {
            **inputs,
            ATTEMPT: (str, dspy.InputField()),
            FEEDBACK: (str, dspy.OutputField()),
        }
        answering = {**inputs, ATTEMPTS: (str, dspy.InputField()), **outputs}
        self.criticise = dspy.Predict(
            dspy.make_signature(criticising, f"{task_says}\n{_CRITICISE}")
        )
        self.again = dspy.Predict(dspy.make_signature(answering, f"{task_says}\n{_AGAIN}"))
        for predictor in (self.criticise, self.again):
            predictor.lm, predictor.config = last.lm, dict(last.config)
        if len(predictors) == 1:
            self.again.demos = [_as_refinement(demo, outputs) for demo in last.demos]

    def answer(self, **inputs: Any) -> dspy.Prediction:
        """The refined answer."""
        taken = signature_of(self.criticise).input_fields
        known = {name: value for name, value in inputs.items() if name in taken}
        answer = outputs_of(self.module(**inputs))
        history: list[str] = []
        for number in range(1, self.rounds + 1):
            named = {name: answer[name] for name in self.output_names if name in answer}
            attempt = labelled_lines(named or answer)
            feedback = self.criticise(**known, **{ATTEMPT: attempt})[FEEDBACK]
            history.append(f"{number}. {attempt}\nFeedback: {feedback}")
            answer = outputs_of(self.again(**known, **{ATTEMPTS: "\n".join(history)}))
        return dspy.Prediction(**{ATTEMPTS: "\n".join(history), **answer})


def _as_refinement(demo: Any, outputs: Iterable[str]) -> dspy.Example:
    """A worked example of the task as one of refining: its own answer as the attempt, with which
    nothing is wrong. Without an attempt in it, it would show a small model another form than the
    one that it is asked in."""
    attempt = labelled_lines({name: demo[name] for name in outputs if name in demo})
    return dspy.Example(**{**dict(demo), ATTEMPTS: f"1. {attempt}\nFeedback: {NOTHING}"})


def _task_inputs(predictors: list[dspy.Predict]) -> dict[str, tuple[Any, Any]]:
    """The inputs that no earlier predictor makes: those of the whole task."""
    asked: dict[str, tuple[Any, Any]] = {}
    made: set[str] = set()
    for predictor in predictors:
        signature = signature_of(predictor)
        asked |= {
            name: one
            for name, one in _fields_of(signature.input_fields).items()
            if name not in made and name not in asked
        }
        made |= signature.output_fields.keys()
    return asked


def _fields_of(fields: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (field.annotation, field) for name, field in fields.items()}


NOTHING_FOUND = "No passage was found."
PASSAGES_FIELD = "passages"


class Retriever(dspy.Module):
    """The passages of a corpus that have most to do with the inputs, by BM25 (Robertson and
    Zaragoza 2009; the bm25s library).

    As the draft of a :class:`Collaboration` it is the baseline of retrieval-augmented generation.
    It asks no model, so that such a program has nothing to sample or tune. The corpus is indexed
    once; copies of the module share it, and no saved state has it.

    Args:
        corpus: the passages. White space is made one space, and what is there twice is taken once.
        k: how many passages are given, at most. One that shares no word with the query is never
            given.
        field: the name of the output.
        query: the inputs that make the query; by default all that are given.
        characters: the length of the output at most, from 1 to 4,000; the passage that does not fit
            any more is cut at a word.
        stopwords: words that do not count, as bm25s knows them: a language such as ``"english"``,
            or None for none.

    Do not put into the corpus what an example is later scored on: a passage that quotes its answer
    is an oracle, not a baseline.

    Raises:
        ProgramError: no passages, or a number out of range.
    """

    def __init__(
        self,
        corpus: Sequence[str],
        k: int = 3,
        *,
        field: str = DRAFT_FIELD,
        query: Sequence[str] | None = None,
        characters: int = 3000,
        stopwords: str | None = "english",
    ) -> None:
        super().__init__()
        if k < 1 or not 1 <= characters <= LONGEST_DRAFT:
            raise ProgramError(
                f"Retriever: k is {k} and must be 1 or more; characters is {characters}: from 1 "
                f"to {LONGEST_DRAFT}."
            )
        self.k, self.field, self.characters = k, field, characters
        self.query = None if query is None else tuple(query)
        self._index = _Index(corpus, stopwords)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The fields of the draft: the output."""
        return (self.field,)

    def search(self, query: str) -> list[str]:
        """The passages for a query, best first; of equal ones the earlier in the corpus comes
        first."""
        return self._index.search(query, self.k)

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The passages for the inputs, numbered, as one text in the output field.

        Raises:
            ProgramError: an input that ``query`` names is not given.
        """
        missing = [name for name in self.query or () if name not in inputs]
        if missing:
            raise ProgramError(
                f"Retriever: its query needs {missing}, but the inputs are {sorted(inputs)}."
            )
        text = " ".join(str(inputs[name]) for name in self.query or inputs)
        return dspy.Prediction(**{self.field: _format_passages(self.search(text), self.characters)})


class Grounded(dspy.Module):
    """A drafter that reads passages: the weak model gets what a retriever finds as an extra input,
    and drafts from it.

    The weak model is tuned as that of any drafter: a trace has the prompt with the passages in it.

    Args:
        retriever: a :class:`Retriever`, or any module that gives one text for the inputs.
        drafter: a signature, or a module. One with a single predictor gets the extra input when it
            does not have it; one with several must take it itself. It is copied.
        field: the name of the extra input.

    Raises:
        ProgramError: none of several predictors takes the extra input.
    """

    def __init__(
        self,
        retriever: dspy.Module,
        drafter: str | type[dspy.Signature] | dspy.Module,
        field: str = PASSAGES_FIELD,
    ) -> None:
        super().__init__()
        self.retriever, self.field = retriever, field
        self.drafter: dspy.Module = (
            drafter.deepcopy() if isinstance(drafter, dspy.Module) else dspy.Predict(drafter)
        )
        signatures = [signature_of(predictor) for predictor in self.drafter.predictors()]
        if not any(field in signature.input_fields for signature in signatures):
            if len(signatures) != 1:
                raise ProgramError(
                    f"Grounded: the drafter has {len(signatures)} predictors and none takes "
                    f'"{field}". Give one of '
                    "them that input, or name another with field=."
                )
            self.drafter.predictors()[0].signature = signatures[0].append(
                field, dspy.InputField(), str
            )

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The drafter's outputs for the inputs and the passages."""
        found = draft_text(self.retriever(**inputs), self.field)
        return self.drafter(**inputs, **{self.field: found})


def rag(program: Collaboration, retriever: dspy.Module) -> Collaboration:
    """The program with passages in the place of drafts: the same strong model, prompts, demos and
    adapter."""
    made = program.deepcopy()
    made.draft = retriever
    return made


def grounded(
    program: Collaboration, retriever: dspy.Module, field: str = PASSAGES_FIELD
) -> Collaboration:
    """The program with a weak model that reads passages and drafts from them: its own drafter with
    an extra input.

    Raises:
        ProgramError: as :class:`Grounded`.
    """
    return rag(program, Grounded(retriever, program.draft, field))


class _Index:
    """A corpus and its BM25 index: made once, never changed, shared by copies and by threads."""

    def __init__(self, corpus: Sequence[str], stopwords: str | None) -> None:
        import logging

        check_extra("retrieval", "Retriever", ProgramError)
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
        if isinstance(corpus, str):
            raise ProgramError("Retriever: the corpus is one string; give a list of passages.")
        texts = dict.fromkeys(" ".join(str(passage).split()) for passage in corpus)
        self.passages = [text for text in texts if text]
        self._stopwords: Any = stopwords or []
        words = self._words(self.passages, return_ids=True)
        if not any(words.ids):
            raise ProgramError("Retriever: the corpus has no passage with a word to search for.")
        self._bm25 = bm25s.BM25()
        self._bm25.index(words, show_progress=False)

    def search(self, query: str, k: int) -> list[str]:
        """At most ``k`` passages with a score above 0, best first, then in the corpus' order."""
        words = self._words([query], return_ids=False)[0]
        if not words:
            return []
        scores = self._bm25.get_scores(words)
        order = (-scores).argsort(kind="stable")[:k]
        return [self.passages[place] for place in order.tolist() if scores[place] > 0]

    def _words(self, texts: list[str], *, return_ids: bool) -> Any:
        import bm25s

        # bm25s drops words of one letter unless it is told: vitamin C, 5 bar.
        whole = r"(?u)\b\w+\b"
        return bm25s.tokenize(
            texts,
            token_pattern=whole,
            stopwords=self._stopwords,
            return_ids=return_ids,
            show_progress=False,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Index:
        return self


def _format_passages(passages: list[str], characters: int) -> str:
    """Passages as "1. ...", each on a line of its own, harmless as a draft is; the last is cut
    where ``characters`` end."""
    lines = [f"{number}. {sanitize_draft(one)}" for number, one in enumerate(passages, start=1)]
    text = "\n".join(lines) or NOTHING_FOUND
    if len(text) <= characters:
        return text
    cut, _, _ = text[: characters + 1].rpartition(" ")
    return re.sub(r"\n\d+\.?$", "", (cut or text[:characters]).strip())
