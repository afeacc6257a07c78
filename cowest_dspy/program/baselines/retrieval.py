"""Passages of a corpus for the strong model (retrieval-augmented generation), or for the weak model
that drafts from them.

retriever = Retriever(passages, k=3)
rag(program, retriever)                     # the strong model reads the passages where it would
    have read a draft
grounded(program, retriever)                # the weak model reads the passages and drafts; it can
    be tuned as before
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import dspy

from cowest_dspy.errors import ProgramError
from cowest_dspy.program.collaboration import (
    DRAFT_FIELD,
    LONGEST_DRAFT,
    Collaboration,
    draft_text,
    sanitize_draft,
    signature_of,
)

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
        return dspy.Prediction(**{self.field: _numbered(self.search(text), self.characters)})


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
    return _drafted_by(retriever, program)


def grounded(
    program: Collaboration, retriever: dspy.Module, field: str = PASSAGES_FIELD
) -> Collaboration:
    """The program with a weak model that reads passages and drafts from them: its own drafter with
    an extra input.

    Raises:
        ProgramError: as :class:`Grounded`.
    """
    return _drafted_by(Grounded(retriever, program.draft, field), program)


def _drafted_by(drafter: dspy.Module, program: Collaboration) -> Collaboration:
    made = program.deepcopy()
    made.draft = drafter
    return made


class _Index:
    """A corpus and its BM25 index: made once, never changed, shared by copies and by threads."""

    def __init__(self, corpus: Sequence[str], stopwords: str | None) -> None:
        import logging

        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
        if isinstance(corpus, str):
            raise ProgramError("Retriever: the corpus is one string; give a list of passages.")
        self.passages = [
            text
            for text in dict.fromkeys(" ".join(str(passage).split()) for passage in corpus)
            if text
        ]
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


def _numbered(passages: list[str], characters: int) -> str:
    """Passages as "1. ...", each on a line of its own, harmless as a draft is; the last is cut
    where ``characters`` end."""
    text = (
        "\n".join(
            f"{number}. {sanitize_draft(passage)}"
            for number, passage in enumerate(passages, start=1)
        )
        or NOTHING_FOUND
    )
    if len(text) <= characters:
        return text
    cut, _, _ = text[: characters + 1].rpartition(" ")
    return re.sub(r"\n\d+\.?$", "", (cut or text[:characters]).strip())
