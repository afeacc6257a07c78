"""MedMCQA: medical exam questions with four options (Pal et al., CHIL 2022, arXiv 2203.14371), and
the program that answers them.

The rows are those of the Hub, "hub:openlifescienceai/medmcqa", or of a folder with train.jsonl,
dev.jsonl and perhaps test.jsonl with the same fields: id, question, opa, opb, opc, opd, cop (0 to
3; -1 where the answer is kept secret), exp, subject_name. What is read becomes four splits, by a
shuffle of a seed:

    archive  three in four of the published training rows: the drafter learns from these, and from
             their explanations (``exp``)
    train    the others, questions with answers only, where drafts are judged by what the strong
             model makes of them
    dev      to choose settings and accept rounds; dev.jsonl; on the Hub a part of the training rows
    test     only ever counted; test.jsonl, or without one that has answers half of dev.jsonl; on
             the Hub the official validation
             split, since the official test split has no answers

What nearly stands in test is dropped from dev, train and archive, what nearly stands in dev from
train and archive, and what nearly stands in train from archive; ``dropped`` counts it.

``exp`` often says which option is right. It stands in no input and no prompt: cleaned of such
sentences it is what the drafter is taught to write, what may be looked up (``corpus``, of training
rows), and the ceiling (``oracle_explanation``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import dspy

from cowest_dspy import Collaboration, LineAdapter
from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.experiment.data import read_rows
from cowest_dspy.pairs.texts import DistinctSplits, drop_near_duplicates
from cowest_dspy.program.adapters import training_row

HUB = "hub:openlifescienceai/medmcqa"
LETTERS = "ABCD"
FIELDS = ("id", "question", "opa", "opb", "opc", "opd", "cop")

ARCHIVE = 0.75  # of the training rows
DEV = 600  # cut off the Hub's training rows
MOST_TRAINING = 10_000  # of the Hub's 180,000 training rows, drawn by the seed
MOST_SFT = 600  # rows that the drafter learns from
MOST_ANSWERED = (
    100  # rows of train, beside as many of archive, that the weak model learns to answer alone from
)
MOST_WORDS = 45  # of an explanation
LONGEST = 750  # characters of an SFT row: at most 240 tokens, as SmolLM2 counts them

DRAFT_TASKS = {
    "direct": (
        "Answer the medical exam question: write the letter and the text of the right option."
    ),
    "knowledge": "Write what a medical textbook says that helps with the exam question.",
    "chain_of_thought": (
        "Reason about the medical exam question in a sentence or two, then write the right option."
    ),
}
ANSWER_TASK = "Answer a medical exam question with the letter of the right option: A, B, C or D."


def examples(split: str, seed: int = 0, rows: str = HUB) -> list[dict[str, Any]]:
    """The questions of a split: dicts of id, question, options ("A. ...", one a line), answer (a
    letter), subject, and oracle_explanation (what is known about it, or which option it is where
    nothing is: the ceiling's, for no model at inference).

    Args:
        split: archive, train, dev or test.
        seed: of the shuffles that make the splits.
        rows: a folder or "hub:NAME", see the top of this file.

    Raises:
        DataError: the rows cannot be had or lack fields, or there is no such split.
    """
    made = _splits(str(rows), seed).splits
    if split not in made:
        raise DataError(f'MedMCQA has no split "{split}": use {", ".join(reversed(made))}.')
    return [_example(row) for row in made[split]]


def dropped(seed: int = 0, rows: str = HUB) -> dict[str, int]:
    """How many rows each split lost because they nearly stand in a more protected one."""
    return dict(_splits(str(rows), seed).dropped)


def corpus(rows: str = HUB, seed: int = 0) -> list[str]:
    """What a retriever may look things up in: the cleaned explanations of archive and train, none
    of dev or test."""
    made = _splits(str(rows), seed).splits
    texts = (cleaned(row, most_words=120) for split in ("archive", "train") for row in made[split])
    return list(dict.fromkeys(text for text in texts if text))


@lru_cache(maxsize=4)
def _splits(rows: str, seed: int) -> DistinctSplits:
    draw = random.Random(f"medmcqa-{seed}")
    training, dev, test = _published(rows, draw)
    training = draw.sample(training, len(training))
    border = round(len(training) * ARCHIVE)
    made = {"test": test, "dev": dev, "train": training[border:], "archive": training[:border]}
    return drop_near_duplicates(made, _with_options, _with_answer)


def _published(rows: str, draw: random.Random) -> tuple[list[Any], list[Any], list[Any]]:
    """The rows to train on, dev's and test's."""
    training = _labelled(read_rows(rows, "train"), "train")
    if rows.startswith("hub:"):
        training = draw.sample(training, min(MOST_TRAINING, len(training)))
        cut = min(DEV, len(training) // 10)
        return (
            training[cut:],
            training[:cut],
            _labelled(read_rows(rows, "validation"), "validation"),
        )
    dev = _labelled(read_rows(rows, "dev"), "dev")
    test = (
        _labelled(read_rows(rows, "test"), "test")
        if (Path(rows).expanduser() / "test.jsonl").is_file()
        else []
    )
    if not test:
        dev = draw.sample(dev, len(dev))
        dev, test = dev[: len(dev) // 2], dev[len(dev) // 2 :]
    return training, dev, test


def _labelled(rows: Sequence[Mapping[str, Any]], split: str) -> list[Mapping[str, Any]]:
    """The rows whose answer is known."""
    for number, row in enumerate(rows, start=1):
        missing = [name for name in FIELDS if row.get(name) is None]
        if missing:
            raise DataError(
                f"MedMCQA ({split}), row {number}: {', '.join(missing)} is missing. A row has "
                f"{', '.join(FIELDS)}."
            )
    return [row for row in rows if row["cop"] in range(4)]


def _options(row: Mapping[str, Any]) -> list[str]:
    return [" ".join(str(row[name]).split()) for name in ("opa", "opb", "opc", "opd")]


def _with_options(row: Mapping[str, Any]) -> str:
    """A question and its options in whatever order."""
    return " ".join([str(row["question"]), *sorted(_options(row), key=str.casefold)])


def _with_answer(row: Mapping[str, Any]) -> str:
    """A question and its right answer, whatever the other options."""
    return f"{row['question']} {_options(row)[row['cop']]}"


def _inputs(row: Mapping[str, Any]) -> dict[str, str]:
    options = "\n".join(
        f"{letter}. {text}" for letter, text in zip(LETTERS, _options(row), strict=True)
    )
    return {"question": " ".join(str(row["question"]).split()), "options": options}


def _choice(row: Mapping[str, Any]) -> str:
    return f"{LETTERS[row['cop']]}. {_options(row)[row['cop']]}"


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(row["id"]),
        **_inputs(row),
        "answer": LETTERS[row["cop"]],
        "subject": row.get("subject_name") or "",
        "oracle_explanation": cleaned(row) or f"It is {_options(row)[row['cop']]}.",
    }


# "Ans. (b) Iron", "Answer- C. Iron", "Ans: is 'd' i.e., Iron": how many explanations begin.
_GIVEN_AWAY = re.compile(
    r"^\W*(?:the\s+)?(?:correct\s+)?(?:ans(?:wer)?|option|choice)\b\W*(?:is\b\W*)?(?:option\b\W*)?(?:[a-e]\b\W*)?(?:i\.?\s?e\b\W*)?",
    re.IGNORECASE,
)
# Sentences that speak of the exam, not of medicine.
_OF_THE_EXAM = re.compile(
    r"\b(?:ans|answers?|options?|choices?|correct|incorrect|in this "
    r"question|ref|reference|page|pg|https?)\b|\bp\s?\d+|\([a-e]\)",
    re.IGNORECASE,
)
# "(Ref Guyton 13/e p108)", "Ref: Ghai, 8 ed., pg. 49", with or without a space before and behind.
_REFERENCE = re.compile(
    r"[\[(]\s*[Rr]ef\b[^)\]]*[)\]]|Ref(?:\b|(?=[A-Z]))[^\n]{0,100}?\bp(?:a?g|age)?s?\.?\s?\d[\d,-]*"
)
# The published text has lost many spaces: "is low.Magnesium is needed".
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[a-z)][.!?])(?=[A-Z])|\n+")


def cleaned(row: Mapping[str, Any], most_words: int = MOST_WORDS) -> str:
    """A row's ``exp`` as whole sentences of at most ``most_words`` words, without those that say
    which option is right.

    Gives "" where there is no explanation, or nothing of five words is left of it. ``"Ans. (b)
    IronIron is a part of haem. So B is the answer."`` gives ``"Iron is a part of haem."``.
    """
    text = _REFERENCE.sub(" ", str(row.get("exp") or "").replace("\xa0", " "))
    bare = _GIVEN_AWAY.sub("", text, count=1)
    if bare != text:
        bare = _without_beginning(bare, _options(row)[row["cop"]])
    sentences = [
        " ".join(sentence.split()).lstrip(")-\u2013\u2022*: ").rstrip("-: ")
        for sentence in _SENTENCE.split(bare)
    ]
    kept: list[str] = []
    for sentence in sentences:
        if not sentence or _OF_THE_EXAM.search(sentence):
            continue
        if kept and len(" ".join([*kept, sentence]).split()) > most_words:
            break
        kept.append(sentence if sentence[-1] in ".!?" else f"{sentence}.")
    words = " ".join(kept).split()[:most_words]
    return " ".join(words) if len(words) >= 5 else ""


def _without_beginning(text: str, beginning: str) -> str:
    """The text without ``beginning`` at its start, which may run into the next word."""
    start = r"\W*".join(re.escape(word) for word in beginning.split())
    return (
        re.sub(rf"^\W*{start}[\s.,:;)\]-]*", "", text, count=1, flags=re.IGNORECASE)
        if start
        else text
    )


class Direct(dspy.Signature):
    __doc__ = DRAFT_TASKS["direct"]

    question: str = dspy.InputField()
    options: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Knowledge(dspy.Signature):
    __doc__ = DRAFT_TASKS["knowledge"]

    question: str = dspy.InputField()
    options: str = dspy.InputField()
    background: str = dspy.OutputField()


class Reasoning(dspy.Signature):
    __doc__ = DRAFT_TASKS["chain_of_thought"]

    question: str = dspy.InputField()
    options: str = dspy.InputField()
    reasoning: str = dspy.OutputField()
    answer: str = dspy.OutputField()


class Alone(dspy.Signature):
    __doc__ = ANSWER_TASK

    question: str = dspy.InputField()
    options: str = dspy.InputField()
    answer: Literal["A", "B", "C", "D"] = dspy.OutputField()


class Refine(dspy.Signature):
    __doc__ = ANSWER_TASK

    question: str = dspy.InputField()
    options: str = dspy.InputField()
    background: str = dspy.InputField()
    answer: Literal["A", "B", "C", "D"] = dspy.OutputField()


DRAFTS: dict[str, type[dspy.Signature]] = {
    "direct": Direct,
    "knowledge": Knowledge,
    "chain_of_thought": Reasoning,
}


def draft_rows(
    seed: int = 0, rows: str = HUB, draft: str = "knowledge", most: int = MOST_SFT
) -> list[dict[str, Any]]:
    """What the drafter learns from, at most ``most`` rows of archive: the prompts of
    ``program(draft)`` and what to write.

    direct: the right letter and its text, since to a small model, and to the one that reads it, a
        bare letter says little.
    knowledge: the cleaned explanation. chain_of_thought: the cleaned explanation, then letter and
        text. The last two leave out questions without an explanation; all leave out rows of more
        than 750 characters.
    """
    signature = _drafting(draft)
    made: list[dict[str, Any]] = []
    for row in _splits(str(rows), seed).splits["archive"]:
        known = cleaned(row)
        if known or draft == "direct":
            outputs = {"background": known, "reasoning": known, "answer": _choice(row)}
            made.append(training_row(signature, _inputs(row), outputs))
    return _short(made)[:most]


def answer_rows(seed: int = 0, rows: str = HUB, most: int = MOST_SFT) -> list[dict[str, Any]]:
    """What the weak model learns from when it answers by itself: the letters of ``most`` questions
    of archive and of 100 of train, about those whose answers the collaboration learns from, too."""
    made = _splits(str(rows), seed).splits
    asked = [
        [training_row(Alone, _inputs(row), {"answer": LETTERS[row["cop"]]}) for row in made[split]]
        for split in ("archive", "train")
    ]
    return _short(asked[0])[:most] + _short(asked[1])[:MOST_ANSWERED]


def _short(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row
        for row in rows
        if sum(len(message["content"]) for message in row["prompt"] + row["completion"]) <= LONGEST
    ]


# Worked examples, written for this file. Three drafts in eight are wrong, so that none is believed
# unread. The reasoning is for the strong model when it thinks alone.
SHOTS = (
    {
        "question": "Which vitamin is made in the skin when the sun shines on it?",
        "options": "A. Vitamin A\nB. Vitamin C\nC. Vitamin D\nD. Vitamin K",
        "known": "Ultraviolet light makes cholecalciferol, vitamin D3, of a sterol in the skin.",
        "drafted": "C. Vitamin D",
        "reasoning": "Sunlight on the skin makes vitamin D3, so it is option C.",
        "answer": "C",
    },
    {
        "question": "A lack of which of these causes scurvy?",
        "options": "A. Thiamine\nB. Ascorbic acid\nC. Niacin\nD. Folic acid",
        "known": "Scurvy comes of polished rice, which lacks thiamine.",
        "drafted": "A. Thiamine",
        "reasoning": "Scurvy comes of a lack of vitamin C, which is ascorbic acid, option B.",
        "answer": "B",
    },
    {
        "question": "How many chambers does the heart of an adult have?",
        "options": "A. Four\nB. Two\nC. Three\nD. Five",
        "known": "There are two atria and two ventricles.",
        "drafted": "A. Four",
        "reasoning": "Two atria and two ventricles are four, option A.",
        "answer": "A",
    },
    {
        "question": "Which cells of the pancreas secrete insulin?",
        "options": "A. Alpha cells\nB. Delta cells\nC. Acinar cells\nD. Beta cells",
        "known": "The alpha cells of the islets lower the blood sugar.",
        "drafted": "A. Alpha cells",
        "reasoning": "Insulin comes from the beta cells, option D.",
        "answer": "D",
    },
    {
        "question": "All of these are bones of the upper limb except:",
        "options": "A. Humerus\nB. Radius\nC. Fibula\nD. Ulna",
        "known": (
            "The fibula lies beside the tibia, in the leg. Radius and ulna are the bones of "
            "the forearm."
        ),
        "drafted": "C. Fibula",
        "reasoning": "The fibula is a bone of the leg, so it is option C.",
        "answer": "C",
    },
    {
        "question": "Bile is made in the:",
        "options": "A. Gall bladder\nB. Liver\nC. Spleen\nD. Duodenum",
        "known": "The gall bladder keeps the bile and gives it off after a meal.",
        "drafted": "A. Gall bladder",
        "reasoning": "The liver makes bile, the gall bladder only keeps it, so it is option B.",
        "answer": "B",
    },
    {
        "question": "The diaphragm gets its motor supply from the:",
        "options": "A. Vagus nerve\nB. Intercostal nerves\nC. Accessory nerve\nD. Phrenic nerve",
        "known": "C3, C4 and C5 form the phrenic nerve, which goes down to the diaphragm.",
        "drafted": "D. Phrenic nerve",
        "reasoning": "C3 to C5 form the phrenic nerve, which moves the diaphragm, option D.",
        "answer": "D",
    },
    {
        "question": "In kidney failure the heart is most endangered by a high level of:",
        "options": "A. Potassium\nB. Calcium\nC. Sodium\nD. Albumin",
        "known": "A failing kidney keeps potassium back. Too much of it stops the heart.",
        "drafted": "A. Potassium",
        "reasoning": "The kidney no longer takes potassium out, which stops the heart, option A.",
        "answer": "A",
    },
)


def program(draft: str = "knowledge") -> Collaboration:
    """The weak model drafts an answer, what it knows, or reasons and an answer; the strong model
    names the right option."""
    signature = _drafting(draft)
    demos = [
        dspy.Example(**_shot(draft, shot)).with_inputs("question", "options", "background")
        for shot in SHOTS
    ]
    return Collaboration(
        draft=dspy.Predict(signature),
        refine=dspy.Predict(Refine),
        demos=demos,
        adapter=LineAdapter(),
    )


def direct() -> dspy.Module:
    """The weak model answers by itself: the rival of the collaboration."""
    return dspy.Predict(Alone)


def _shot(draft: str, shot: Mapping[str, str]) -> dict[str, str]:
    texts = {
        "direct": shot["drafted"],
        "knowledge": shot["known"],
        "chain_of_thought": f"Reasoning: {shot['known']}\nAnswer: {shot['drafted']}",
    }
    return {name: shot[name] for name in ("question", "options", "reasoning", "answer")} | {
        "background": texts[draft]
    }


def _drafting(draft: str) -> type[dspy.Signature]:
    if draft not in DRAFTS:
        raise ProgramError(f'There is no draft format "{draft}": use {", ".join(DRAFTS)}.')
    return DRAFTS[draft]
