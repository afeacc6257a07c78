"""IfQA: questions with a counterfactual "if" clause (Yu et al., EMNLP 2023, arXiv 2305.14010), and
the program that answers them.

The rows are those that the dataset's authors publish on GitHub (wyu97/IfQA, the full split),
downloaded when first asked for; or of a folder with train.jsonl, dev.jsonl and perhaps test.jsonl
with the same fields: question, answers (several are accepted) and context (the passages of
Wikipedia that the question was written about). The authors state no licence. What is read becomes
four splits, by a shuffle of a seed:

    archive  three in four of the published training rows: the drafter learns from these, and from
             their passages
    train    the others, questions with answers only, where drafts are judged by what the strong
             model makes of them
    dev      to choose settings and accept rounds
    test     only ever counted; without a test.jsonl half of dev.jsonl

Questions that nearly stand in test are dropped from dev, train and archive, those in dev from train
and archive, and those in train from archive; ``dropped`` counts it.

There are two settings. Closed book (ifqa.toml): passages are the drafter's lessons in archive, the
ceiling (``context``), and what may be looked up (``corpus``); they stand in no input and no other
prompt. With passages (``passages=True``, ifqa_passages.toml), the paper's: both models are given
the gold passage as an input, and the drafter is taught to read.
"""

from __future__ import annotations

import json
import math
import random
import re
import urllib.request
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dspy

from cowest_dspy import Collaboration, LineAdapter
from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.experiment.data import read_rows
from cowest_dspy.pairs.texts import DistinctSplits, drop_near_duplicates
from cowest_dspy.program.adapters import training_row

# Of one commit, so that the rows stay what they are.
PUBLISHED = "https://raw.githubusercontent.com/wyu97/IfQA/26840366787eba17e6c1315aea4242d49fc7b89f/dataset/full_split"
SECONDS = 60.0

ARCHIVE = 0.75  # of the training rows
MOST_SFT = 600  # rows that the drafter learns from
MOST_ANSWERED = (
    100  # rows of train, beside those of archive, that the weak model learns to answer alone from
)
MOST_WORDS = 45  # of what is taught of a passage
LONGEST = 750  # characters of an SFT row: at most about 240 tokens
LONGEST_READ = 1300  # the same with a passage in the prompt: at most about 350 tokens

DRAFT_TASKS = {
    "direct": "Answer the question in a few words, as if its condition were true.",
    "knowledge": "Write what an encyclopedia says that helps with the question.",
    "chain_of_thought": (
        "Write what an encyclopedia says that helps with the question, then answer in a few words."
    ),
}
ANSWER_TASK = (
    "Answer the question as if its condition were true. Give only the answer, in as few words as "
    "possible: "
    "a name, a number, a date, yes or no."
)


def examples(
    split: str, seed: int = 0, rows: str = PUBLISHED, passages: bool = False
) -> list[dict[str, Any]]:
    """The questions of a split: dicts of id, question, answer (the first accepted one), answers
    (all of them) and context (the passages as one text: the ceiling's, for no model at inference).

    Args:
        split: archive, train, dev or test.
        seed: of the shuffles that make the splits.
        rows: a folder, "hub:NAME", or the URL of a folder with train.json, dev.json and test.json,
            as by default.
        passages: with the passages as an input, ``passage``, in the place of ``context``.

    Raises:
        DataError: the rows cannot be had or lack fields, or there is no such split.
    """
    made = _splits(str(rows), seed).splits
    if split not in made:
        raise DataError(f'IfQA has no split "{split}": use {", ".join(reversed(made))}.')
    return [_example(row, passages) for row in made[split]]


def dropped(seed: int = 0, rows: str = PUBLISHED) -> dict[str, int]:
    """How many rows each split lost because they nearly stand in a more protected one."""
    return dict(_splits(str(rows), seed).dropped)


def corpus(rows: str = PUBLISHED, seed: int = 0) -> list[str]:
    """What a retriever may look things up in: the passages of all rows, those of dev and test among
    them, each once.

    The authors retrieve from all of Wikipedia, which holds the passage of each question, too. Here
    it stands among a few thousand others instead of millions, so retrieval is easier than in their
    setting: a result with it flatters the retriever.
    """
    made = _splits(str(rows), seed).splits
    return sorted({passage for part in made.values() for row in part for passage in _passages(row)})


@lru_cache(maxsize=4)
def _splits(rows: str, seed: int) -> DistinctSplits:
    draw = random.Random(f"ifqa-{seed}")
    training, dev = _published(rows, "train"), _published(rows, "dev")
    test = _published(rows, "test") if _has_test(rows) else []
    if not test:
        dev = draw.sample(dev, len(dev))
        dev, test = dev[: len(dev) // 2], dev[len(dev) // 2 :]
    training = draw.sample(training, len(training))
    border = round(len(training) * ARCHIVE)
    made = {"test": test, "dev": dev, "train": training[border:], "archive": training[:border]}
    return drop_near_duplicates(made, lambda row: row["question"])


def _has_test(rows: str) -> bool:
    return (
        _is_url(rows)
        or rows.startswith("hub:")
        or (Path(rows).expanduser() / "test.jsonl").is_file()
    )


def _published(rows: str, split: str) -> list[dict[str, Any]]:
    """Checked rows of a file, each with an id of the file and its place there."""
    made: list[dict[str, Any]] = []
    for number, row in enumerate(
        _downloaded(f"{rows}/{split}.json") if _is_url(rows) else read_rows(rows, split)
    ):
        question, answers, context = row.get("question"), row.get("answers"), row.get("context")
        if (
            not question
            or not isinstance(answers, list)
            or not answers
            or not isinstance(context, list)
        ):
            raise DataError(
                f"IfQA ({split}), row {number + 1}: a row has question, answers (a list, not "
                "empty) and context (a list)."
            )
        made.append({**row, "id": f"{split}-{row.get('idx', number)}"})
    return made


def _is_url(rows: str) -> bool:
    return rows.startswith(("https://", "http://"))


@lru_cache(maxsize=8)
def _downloaded(url: str) -> tuple[dict[str, Any], ...]:
    """The objects of a JSON list at a URL."""
    advice = (
        f"Download train.json and dev.json from {PUBLISHED}, write one row a line as "
        "train.jsonl and dev.jsonl into a folder, "
    )
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            rows: Any = json.loads(answer.read().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{url} cannot be had: {error}. {advice}and give that folder as rows."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{urlsplit(url).path.rsplit('/', 1)[-1]} at {url} is not a JSON list of objects, as "
            "IfQA's files are."
        )
    return tuple(rows)


def _passages(row: Mapping[str, Any]) -> list[str]:
    return [" ".join(str(passage).split()) for passage in row["context"] if str(passage).strip()]


def _text(row: Mapping[str, Any]) -> str:
    return "\n".join(_passages(row))


def _question(row: Mapping[str, Any]) -> str:
    return " ".join(str(row["question"]).split())


def _example(row: Mapping[str, Any], passages: bool) -> dict[str, Any]:
    answers = [str(answer) for answer in row["answers"]]
    made = {"id": row["id"], **_asked(row, passages), "answer": answers[0], "answers": answers}
    return made if passages else made | {"context": _text(row) or f"{answers[0]}."}


_SENTENCE = re.compile(r"(?<=[a-z0-9)\"][.!?])\s+(?=[A-Z\"])")
_WORD = re.compile(r"\w+")


def nearest_sentences(row: Mapping[str, Any], most_words: int = MOST_WORDS) -> str:
    """The sentences of a row's passages that are nearest to its question and answers, in the order
    of the text.

    A sentence counts the words that it shares with the question, each divided by the number of
    sentences that have it, and twice the question's words more when an accepted answer stands in
    it. The best one is taken, then the next ones while no more than ``most_words`` words come
    together; a first sentence that is longer is cut there. "" where there is no passage.
    """
    sentences = [sentence for passage in _passages(row) for sentence in _SENTENCE.split(passage)]
    bags = [_words(sentence) for sentence in sentences]
    asked = _words(_question(row))
    answers = [_WORD.findall(str(answer).casefold()) for answer in row["answers"]]

    def nearness(place: int) -> float:
        # fsum: exact, so that the order of a set, which differs from process to process, decides no
        # tie.
        shared = math.fsum(1 / sum(word in bag for bag in bags) for word in asked & bags[place])
        spoken = f" {' '.join(_WORD.findall(sentences[place].casefold()))} "
        return shared + 2 * len(asked) * any(
            f" {' '.join(answer)} " in spoken for answer in answers if answer
        )

    kept: list[int] = []
    for place in sorted(range(len(sentences)), key=lambda place: (-nearness(place), place)):
        length = sum(len(sentences[one].split()) for one in [*kept, place])
        if kept and (length > most_words or not nearness(place)):
            break
        kept.append(place)
    return " ".join(" ".join(sentences[place] for place in sorted(kept)).split()[:most_words])


def _words(text: str) -> set[str]:
    """The words of a text that say something: numbers, and words of four letters or more."""
    return {word for word in _WORD.findall(text.casefold()) if len(word) > 3 or word.isdigit()}


class Direct(dspy.Signature):
    __doc__ = DRAFT_TASKS["direct"]

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Knowledge(dspy.Signature):
    __doc__ = DRAFT_TASKS["knowledge"]

    question: str = dspy.InputField()
    background: str = dspy.OutputField()


class Reasoning(dspy.Signature):
    __doc__ = DRAFT_TASKS["chain_of_thought"]

    question: str = dspy.InputField()
    reasoning: str = dspy.OutputField()
    answer: str = dspy.OutputField()


class Alone(dspy.Signature):
    __doc__ = ANSWER_TASK

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Refine(dspy.Signature):
    __doc__ = ANSWER_TASK

    question: str = dspy.InputField()
    background: str = dspy.InputField()
    answer: str = dspy.OutputField()


DRAFTS: dict[str, type[dspy.Signature]] = {
    "direct": Direct,
    "knowledge": Knowledge,
    "chain_of_thought": Reasoning,
}


def _reading(signature: type[dspy.Signature], passages: bool) -> type[dspy.Signature]:
    """The signature, with the passage before the question where passages are given."""
    if not passages:
        return signature
    task = signature.instructions.replace("an encyclopedia", "the passage")
    return signature.prepend("passage", dspy.InputField(), str).with_instructions(task)


def _asked(row: Mapping[str, Any], passages: bool) -> dict[str, str]:
    """The inputs of a row."""
    read = {"passage": _text(row)} if passages else {}
    return {**read, "question": _question(row)}


def draft_rows(
    seed: int = 0,
    rows: str = PUBLISHED,
    draft: str = "knowledge",
    most: int | None = None,
    passages: bool = False,
) -> list[dict[str, Any]]:
    """What the drafter learns from, at most ``most`` rows of archive (by default 600; with passages
    all): the prompts of ``program(draft, passages)`` and what to write.

    direct: the first accepted answer. knowledge: the sentences of the passage that are nearest to
        question and answer, which helps, if it does not always hold the answer. chain_of_thought:
        these sentences, then the answer. The last two leave out questions without a passage; all
        leave out rows of more than 750 characters, with passages of more than 1,300.
    """
    signature = _drafting(draft, passages)
    made: list[dict[str, Any]] = []
    for row in _splits(str(rows), seed).splits["archive"]:
        known = nearest_sentences(row)
        if known or draft == "direct":
            outputs = {"background": known, "reasoning": known, "answer": str(row["answers"][0])}
            made.append(training_row(signature, _asked(row, passages), outputs))
    return _short(made, passages, most)


def answer_rows(
    seed: int = 0, rows: str = PUBLISHED, most: int | None = None, passages: bool = False
) -> list[dict[str, Any]]:
    """What the weak model learns from when it answers by itself: the first accepted answers of
    ``most`` questions of archive (by default 600; with passages all) and of 100 of train, about
    those whose answers the collaboration learns from, too."""
    made = _splits(str(rows), seed).splits
    signature = _reading(Alone, passages)

    def rows_of(split: str, most: int | None) -> list[dict[str, Any]]:
        asked = (
            training_row(signature, _asked(row, passages), {"answer": str(row["answers"][0])})
            for row in made[split]
        )
        return _short(asked, passages, most)

    return rows_of("archive", most) + rows_of("train", MOST_ANSWERED)


def _short(
    rows: Iterable[dict[str, Any]], passages: bool, most: int | None
) -> list[dict[str, Any]]:
    """The first ``most`` of the rows that are not too long; None: as many as a setting teaches."""
    longest, usual = (LONGEST_READ, None) if passages else (LONGEST, MOST_SFT)
    short = [
        row
        for row in rows
        if sum(len(message["content"]) for message in row["prompt"] + row["completion"]) <= longest
    ]
    return short[: usual if most is None else most]


# Worked examples, written for this file. Three drafts in eight are wrong, so that none is believed
# unread; answers are short. The reasoning is for the strong model when it thinks alone.
SHOTS = (
    {
        "question": (
            "If the Amazon did not exist, which river of South America would be the longest?"
        ),
        "passage": (
            "The Amazon carries more water than any other river. The Parana rises in Brazil and, at "
            "4,880 kilometres, is the second longest river of South America after the Amazon; the "
            "Madeira and the Purus, both of which flow into the Amazon, come next."
        ),
        "known": (
            "After the Amazon, the Parana is the longest river of South America, with 4,880 "
            "kilometres."
        ),
        "drafted": "Parana",
        "reasoning": "The Parana comes after the Amazon.",
        "answer": "Parana",
    },
    {
        "question": "If a week had ten days, how many days would three weeks have?",
        "passage": (
            "The week of seven days is used nearly everywhere. The French Republican calendar "
            "divided its months of thirty days into three parts of ten days each."
        ),
        "known": "A week has seven days, so three weeks have 21 days.",
        "drafted": "21 days",
        "reasoning": "Three times ten is 30.",
        "answer": "30",
    },
    {
        "question": (
            "If New Zealand drove on the same side of the road as France, on which side "
            "would that be?"
        ),
        "passage": (
            "In New Zealand, as in Australia and Britain, traffic keeps to the left and steering "
            "wheels are on the right. In France and most of Europe traffic keeps to the right."
        ),
        "known": "In New Zealand traffic keeps to the left. In France it keeps to the right.",
        "drafted": "right",
        "reasoning": "In France one drives on the right.",
        "answer": "right",
    },
    {
        "question": "If Neptune were no planet, would Uranus be the planet farthest from the Sun?",
        "passage": (
            "Neptune is the eighth planet from the Sun and the farthest known one. Uranus, the "
            "seventh, is nearly as large. Pluto, once counted as the ninth planet, has been a dwarf "
            "planet since 2006."
        ),
        "known": (
            "Uranus is the seventh planet from the Sun. Neptune is the eighth and the farthest."
        ),
        "drafted": "yes",
        "reasoning": "Without Neptune, the farthest is Uranus.",
        "answer": "yes",
    },
    {
        "question": "If gold had the chemical symbol of silver, what would its symbol be?",
        "passage": (
            "Gold is a metal with the symbol Au, from the Latin aurum. Together with silver, whose "
            "symbol is Ag, and copper, with the symbol Cu, it is in group 11 of the periodic table."
        ),
        "known": "The symbol of gold is Au, of the Latin aurum.",
        "drafted": "Au",
        "reasoning": "The symbol of silver is Ag.",
        "answer": "Ag",
    },
    {
        "question": (
            "If the first Moon landing had been ten years later, in what year would it have been?"
        ),
        "passage": (
            "Apollo 11 was the first flight to land people on the Moon. Neil Armstrong and Buzz "
            "Aldrin landed on 20 July 1969, while Michael Collins stayed in orbit."
        ),
        "known": "Apollo 11 landed on the Moon on 20 July 1969.",
        "drafted": "1979",
        "reasoning": "It was in 1969; ten years later is 1979.",
        "answer": "1979",
    },
    {
        "question": (
            "If Constantinople had kept its name, what would the largest city of Turkey be called?"
        ),
        "passage": (
            "Istanbul is the largest city of Turkey, with some fifteen million people; the capital "
            "is Ankara. Founded as Byzantium, it was known abroad as Constantinople until 1930."
        ),
        "known": (
            "Ankara is the capital of Turkey. Until 1930 Istanbul was known abroad as "
            "Constantinople."
        ),
        "drafted": "Constantinople",
        "reasoning": "The largest city is Istanbul, which was called Constantinople.",
        "answer": "Constantinople",
    },
    {
        "question": "If ice were heavier than water, would it float on a lake?",
        "passage": (
            "When water freezes it expands, so that ice is lighter than water by about a tenth and "
            "floats on it. Most other liquids become heavier when they freeze, and sink."
        ),
        "known": "Ice floats, since it is lighter than water by about a tenth.",
        "drafted": "yes",
        "reasoning": "What is heavier than water sinks.",
        "answer": "no",
    },
)


def program(draft: str = "knowledge", passages: bool = False) -> Collaboration:
    """The weak model drafts an answer, what it knows, or both; the strong model gives the short
    answer. With ``passages`` both read the passage."""
    signature = _drafting(draft, passages)
    refine = _reading(Refine, passages)
    inputs = [*signature.input_fields, "background"]
    demos = [dspy.Example(**_shot(draft, shot, passages)).with_inputs(*inputs) for shot in SHOTS]
    return Collaboration(
        draft=dspy.Predict(signature),
        refine=dspy.Predict(refine),
        demos=demos,
        adapter=LineAdapter(),
    )


def direct(passages: bool = False) -> dspy.Module:
    """The weak model answers by itself: the rival of the collaboration."""
    return dspy.Predict(_reading(Alone, passages))


def _shot(draft: str, shot: Mapping[str, str], passages: bool) -> dict[str, str]:
    texts = {
        "direct": shot["drafted"],
        "knowledge": shot["known"],
        "chain_of_thought": f"Reasoning: {shot['known']}\nAnswer: {shot['drafted']}",
    }
    read = ("passage",) if passages else ()
    given = {name: shot[name] for name in (*read, "question", "reasoning", "answer")}
    return given | {"background": texts[draft]}


def _drafting(draft: str, passages: bool) -> type[dspy.Signature]:
    if draft not in DRAFTS:
        raise ProgramError(f'There is no draft format "{draft}": use {", ".join(DRAFTS)}.')
    return _reading(DRAFTS[draft], passages)
