"""The private handbook of the Tarn works, an invented plant: what it says, what is asked about it,
and the program that answers.

No public model can know these machines, so the strong model needs a weak one that has learned them.
Everything is drawn from a
seed: the values of the handbook and the questions. The facts are shared by all splits, since
    knowing them is the weak model's job; questions are not: no question text, and no combination of
    machines, attribute and reading, is in two splits.

    archive  questions that experts once answered, one in three by quoting the handbook, two with
             the bare result: the drafter
             learns from these, and from the handbook's own cards
    train    questions with answers only, where drafts are judged by what the strong model makes of
             them
    dev      questions to choose settings with
    test     questions that are only ever counted
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import dspy

from cowest_dspy import Collaboration, LineAdapter

SPLITS = {"archive": 72, "train": 64, "dev": 60, "test": 240}
# How many of ten questions are of a kind: seven ask for a number, one for a name, two for yes or
# no.
MIX = ("left", "left", "left", "left", "gap", "gap", "sum", "which", "limit", "limit")

# Code names: single words, so that a small model can tell the machines apart from the first token
# on.
MACHINES = (
    "Falcon", "Raven", "Tiger", "Whale", "Dragon", "Titan",
    "Atlas", "Saturn", "Viking", "Baron", "Wizard", "Maple",
)  # fmt: skip

DRAFT_TASK = "Write what the handbook of the Tarn works says."
ANSWER_TASK = (
    "Answer a question about machines of a plant. Work in one short step, then answer "
    "with a number, a name, yes or no."
)
WEAK_ANSWER_TASK = "Answer from the handbook of the Tarn works: a number, a name, yes or no."


@dataclass(frozen=True)
class Attribute:
    """What the handbook gives for each machine, and the ways to ask about it. ``{a}``, ``{b}``:
    machines; ``{n}``: a number."""

    name: str
    values: tuple[int, int]
    fact: str
    card: str
    left: tuple[str, ...]
    limit: tuple[str, ...]
    which: tuple[str, ...]
    gap: tuple[str, ...] = ()
    sum: tuple[str, ...] = ()


ATTRIBUTES = (
    Attribute(
        name="pressure",
        values=(12, 48),
        fact="The {a} may run at up to {n} bar.",
        card="What is the pressure limit of the {a}?",
        left=(
            "The gauge of the {a} shows {n} bar. How many bar is that below its limit?",
            "The {a} runs at {n} bar. By how many bar may the pressure still rise?",
        ),
        limit=(
            "May the {a} run at {n} bar?",
            "The gauge of the {a} shows {n} bar. Is that within its limit?",
        ),
        which=("Which may run at the higher pressure, the {a} or the {b}?",),
        gap=("How many bar lie between the pressure limits of the {a} and the {b}?",),
    ),
    Attribute(
        name="oil",
        values=(12, 48),
        fact="The {a} holds {n} litres of oil.",
        card="How much oil does the {a} hold?",
        left=(
            "There are {n} litres of oil in the {a}. How many litres are missing until it is full?",
            "We poured {n} litres of oil into the empty {a}. How many litres still go in?",
        ),
        limit=(
            "Do {n} litres of oil fill the empty {a}?",
            "Is a drum of {n} litres enough to fill the {a} with oil?",
        ),
        which=("Which holds more oil, the {a} or the {b}?",),
        sum=(
            "How many litres of oil do the {a} and the {b} hold together?",
            "We fill both the {a} and the {b} with oil. How many litres is that in all?",
        ),
    ),
    Attribute(
        name="service",
        values=(12, 48),
        fact="The {a} is serviced every {n} weeks.",
        card="How often is the {a} serviced?",
        left=(
            "The {a} was serviced {n} weeks ago. In how many weeks is it due again?",
            "Since its last service the {a} has run for {n} weeks. How many weeks are left?",
        ),
        limit=(
            "The {a} was last serviced {n} weeks ago. Is it overdue?",
            "Is the {a} overdue {n} weeks after a service?",
        ),
        which=("Which runs longer between services, the {a} or the {b}?",),
        gap=("By how many weeks do the service intervals of the {a} and the {b} differ?",),
    ),
)


@dataclass(frozen=True)
class Handbook:
    """The values of one seed: ``values["oil"]["Raven"]`` is a number of litres."""

    values: dict[str, dict[str, int]] = field(hash=False)

    def fact(self, machine: str, attribute: Attribute) -> str:
        """One fact in plain English."""
        return attribute.fact.format(a=machine, n=self.values[attribute.name][machine])


def handbook(seed: int = 0) -> Handbook:
    """The handbook of a seed; the values of different seeds have nothing to do with each other."""
    draw = random.Random(f"handbook-{seed}")
    return Handbook(
        {a.name: {machine: draw.randint(*a.values) for machine in MACHINES} for a in ATTRIBUTES}
    )


def examples(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """The questions of a split: dicts of id, question, answer, kind and notes (what the handbook
    says: the oracle's, for no model at inference, except for the ceiling).

    ``split`` is archive, train, dev or test. Kinds: left, gap, sum (a number), which (a name),
    limit (yes or no, as many of each).
    """
    return [dict(row) for row in _all(seed)[split]]


@lru_cache(maxsize=4)
def _all(seed: int) -> dict[str, list[dict[str, Any]]]:
    writer = _Writer(handbook(seed), random.Random(f"questions-{seed}"))
    return {split: writer.split(split, count) for split, count in SPLITS.items()}


class _Writer:
    """Writes questions, none of which shares machines, attribute and reading with an earlier
    one."""

    def __init__(self, book: Handbook, draw: random.Random) -> None:
        self.book, self.draw = book, draw
        self.used: set[tuple[Any, ...]] = set()

    def split(self, name: str, count: int) -> list[dict[str, Any]]:
        """``count`` questions: the kinds by MIX, machines and attributes in turn, so that all of
        them are asked about."""
        kinds = [MIX[i % len(MIX)] for i in range(count)]
        rows: list[dict[str, Any]] = []
        deck: dict[str, list[Any]] = {}
        for number, kind in enumerate(kinds):
            row = self._until_new(kind, kinds[:number].count(kind), deck)
            rows.append({"id": f"{name}-{number:03d}", **row})
        self.draw.shuffle(rows)
        return rows

    def _until_new(self, kind: str, nth: int, deck: dict[str, list[Any]]) -> dict[str, Any]:
        for _ in range(1000):
            made = (
                self._single(kind, nth, deck)
                if kind in ("left", "limit")
                else self._pair(kind, deck)
            )
            if made is None or made[0] in self.used:
                continue
            self.used.add(made[0])
            return made[1]
        raise ValueError(f"No new question of kind {kind} is left: ask for fewer.")

    def _next(self, deck: dict[str, list[Any]], name: str, cards: list[Any]) -> Any:
        if not deck.get(name):
            deck[name] = self.draw.sample(cards, len(cards))
        return deck[name].pop()

    def _single(
        self, kind: str, nth: int, deck: dict[str, list[Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A machine and a reading: how much is left (always some), or is it within the limit (every
        other time)."""
        machine, attribute = self._next(
            deck, "facts", [(m, a) for m in MACHINES for a in ATTRIBUTES]
        )
        value = self.book.values[attribute.name][machine]
        yes = nth % 2 == 0
        below = kind == "left" or yes == (attribute.name == "pressure")
        distance = self.draw.randint(2, 11)
        reading = value - distance if below else value + distance
        answer = str(distance) if kind == "left" else "yes" if yes else "no"
        text = self.draw.choice(getattr(attribute, kind)).format(a=machine, n=reading)
        row = {
            "question": text,
            "answer": answer,
            "kind": kind,
            "notes": self.book.fact(machine, attribute),
        }
        return (machine, attribute.name, reading), row

    def _pair(
        self, kind: str, deck: dict[str, list[Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Two machines with different values: sum, difference, or which has more."""
        attribute = self._next(deck, kind, [a for a in ATTRIBUTES if getattr(a, kind)])
        one, two = (self._next(deck, "machines", list(MACHINES)) for _ in range(2))
        values = self.book.values[attribute.name]
        if one == two or values[one] == values[two]:
            return None
        answers = {
            "sum": str(values[one] + values[two]),
            "gap": str(abs(values[one] - values[two])),
            "which": max(one, two, key=lambda machine: values[machine]),
        }
        text = self.draw.choice(getattr(attribute, kind)).format(a=one, b=two)
        notes = f"{self.book.fact(one, attribute)} {self.book.fact(two, attribute)}"
        key = (*sorted((one, two)), attribute.name)
        return key, {"question": text, "answer": answers[kind], "kind": kind, "notes": notes}


def _say(task: str, question: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": task},
        {"role": "user", "content": f"Question: {question}"},
    ]


def _row(task: str, question: str, completion: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": _say(task, question),
        "completion": [{"role": "assistant", "content": completion}],
    }


def cards(seed: int = 0) -> list[dict[str, str]]:
    """The handbook as cards, question and notes: one for each fact."""
    book = handbook(seed)
    return [
        {"question": attribute.card.format(a=machine), "notes": book.fact(machine, attribute)}
        for machine in MACHINES
        for attribute in ATTRIBUTES
    ]


def pages(seed: int = 0) -> list[dict[str, str]]:
    """The handbook as pages, question and notes: one for each machine, with all its facts."""
    book = handbook(seed)
    return [
        {
            "question": f"What does the handbook say about the {machine}?",
            "notes": " ".join(book.fact(machine, attribute) for attribute in ATTRIBUTES),
        }
        for machine in MACHINES
    ]


def draft_rows(seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """What the drafter learns the domain from: the cards, the pages three times, and what an expert
    wrote about each question of the archive. (Facts are learned from pages: as many rows of cards
    alone leave a third of its quotations wrong, or more.)

    Experts are busy: a third of the notes quote the handbook, the others only say what came out.
    Both are right, but a drafter that has learned to say results without working them out is often
    wrong. Nothing in these rows says which habit is of use to the strong model; that is left to
    influence to find out.
    """
    draw = random.Random(f"experts-{seed}")
    archive = examples("archive", seed)
    quoting = set(draw.sample(range(len(archive)), len(archive) // 3))
    notes = [
        row["notes"] if place in quoting else _result(row) for place, row in enumerate(archive)
    ]
    asked = [
        *cards(seed),
        *pages(seed) * 3,
        *({**row, "notes": note} for row, note in zip(archive, notes, strict=True)),
    ]
    return [_row(DRAFT_TASK, row["question"], row["notes"]) for row in asked]


def _result(row: dict[str, Any]) -> str:
    """The terse note of an expert in a hurry: "9 bar.", "The Raven.", "Yes." """
    if row["kind"] == "limit":
        return f"{row['answer'].capitalize()}."
    if row["kind"] == "which":
        return f"The {row['answer']}."
    unit = next(unit for unit in ("bar", "litres", "weeks") if unit in row["notes"])
    return f"{row['answer']} {unit}."


def answer_rows(seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """What the weak model learns from when it must answer by itself: the same pages, and the
    answers of archive and train."""
    known = [_row(DRAFT_TASK, row["question"], row["notes"]) for row in pages(seed)]
    asked = [*examples("archive", seed), *examples("train", seed)]
    return known + [_row(WEAK_ANSWER_TASK, row["question"], row["answer"]) for row in asked]


# Worked examples about machines that are not in the handbook. The background is in many forms, so
# that none is favoured.
SHOTS = (
    {
        "question": "The gauge of the Welda shows 17 bar. How many bar is that below its limit?",
        "background": "The Welda may run at up to 26 bar.",
        "working": "26 - 17 = 9.",
        "answer": "9",
    },
    {
        "question": "Which holds more oil, the Pirro or the Stenna?",
        "background": "Pirro 23 litres, Stenna 31 litres",
        "working": "31 is more than 23, so the Stenna.",
        "answer": "Stenna",
    },
    {
        "question": "The Marn was last serviced 44 weeks ago. Is it overdue?",
        "background": "service of the Marn: every 38 weeks",
        "working": "44 is more than 38, so yes.",
        "answer": "yes",
    },
    {
        "question": "By how many weeks do the service intervals of the Joska and the Obrin differ?",
        "background": "The Joska is serviced every 15 weeks. The Obrin is serviced every 41 weeks.",
        "working": "41 - 15 = 26.",
        "answer": "26",
    },
    {
        "question": "How many litres of oil do the Calto and the Threm hold together?",
        "background": "- Calto: 18 litres of oil\n- Threm: 37 litres of oil",
        "working": "18 + 37 = 55.",
        "answer": "55",
    },
    {
        "question": "May the Ugano run at 33 bar?",
        "background": (
            "Limit 29 bar. The Ugano also needs 14 litres of oil and a service every 20 weeks."
        ),
        "working": "33 is more than 29, so no.",
        "answer": "no",
    },
    {
        "question": (
            "There are 25 litres of oil in the Yarl. How many litres are missing until it is full?"
        ),
        "background": "According to the handbook, the Yarl takes 32 litres of oil.",
        "working": "32 - 25 = 7.",
        "answer": "7",
    },
    {
        "question": "Do 19 litres of oil fill the empty Besko?",
        "background": "Besko = 24 litres",
        "working": "19 is less than 24, so no.",
        "answer": "no",
    },
    {
        "question": "The gauge of the Drand shows 35 bar. Is that within its limit?",
        "background": "up to 43 bar (Drand)",
        "working": "35 is less than 43, so yes.",
        "answer": "yes",
    },
)


class Draft(dspy.Signature):
    __doc__ = DRAFT_TASK

    question: str = dspy.InputField()
    background: str = dspy.OutputField()


class Refine(dspy.Signature):
    __doc__ = ANSWER_TASK

    question: str = dspy.InputField()
    background: str = dspy.InputField()
    working: str = dspy.OutputField()
    answer: str = dspy.OutputField()


class Direct(dspy.Signature):
    __doc__ = WEAK_ANSWER_TASK

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


def program() -> Collaboration:
    """The weak model writes what the handbook says, the strong model works the answer out."""
    demos = [dspy.Example(**shot).with_inputs("question", "background") for shot in SHOTS]
    return Collaboration(
        draft=dspy.Predict(Draft), refine=dspy.Predict(Refine), demos=demos, adapter=LineAdapter()
    )


def direct() -> dspy.Module:
    """The weak model answers by itself: the rival of the collaboration."""
    return dspy.Predict(Direct)
