"""Retrieval as a baseline: passages for the strong model, and passages for the weak one that
drafts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import dspy
import pytest
from baseline_parts import prompts, refiner
from scripted import match, questions, strong_that_reads

from cowest_dspy import Collaboration, Influence, Store, collect, preference_pairs
from cowest_dspy.errors import ProgramError
from cowest_dspy.influence.arms import ask_all, collaboration_arm
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.program import Grounded, Retriever, grounded, rag
from cowest_dspy.program.baselines import NOTHING_FOUND
from cowest_dspy.testing import ScriptedEngine

CORPUS = [
    "The Orvane press runs at 180 degrees.",
    "The  Tamber press runs at 90 degrees.\n",
    "The Tamber press runs at 90 degrees.",
    "Whales are mammals.",
]


# Retriever


def test_the_passages_of_a_query_are_those_that_share_its_words() -> None:
    retriever = Retriever(CORPUS, k=2)
    assert retriever.search("How hot is the Orvane press?") == [
        "The Orvane press runs at 180 degrees.",
        CORPUS[2],
    ]
    assert retriever.search("mammals") == ["Whales are mammals."], (
        "a passage that shares no word is not given"
    )
    assert retriever.search("zzz") == retriever.search("") == retriever.search("the") == []
    assert Retriever(CORPUS, k=9).search("press Tamber") == [CORPUS[2], CORPUS[0]], (
        "a passage that is there twice counts once"
    )
    assert Retriever(["vitamin D", "vitamin C"], k=1).search("Is C a vitamin?") == ["vitamin C"], (
        "a single letter counts"
    )
    assert retriever(question="mammals").toDict() == {"background": "1. Whales are mammals."}
    assert Retriever(CORPUS, field="notes")(question="zzz").toDict() == {"notes": NOTHING_FOUND}
    assert Retriever(CORPUS, stopwords=None, k=1).search("Is the sky blue?") == [CORPUS[0]]


def test_ties_go_to_the_earlier_passage() -> None:
    corpus = [f"press {letter * 3}" for letter in "dbcae"]
    assert Retriever(corpus, k=3).search("press") == corpus[:3]
    assert Retriever(corpus[::-1], k=2).search("press") == corpus[:-3:-1]


def test_the_query_is_made_of_the_inputs_that_are_named() -> None:
    retriever = Retriever(CORPUS, k=1, query=["topic"])
    assert retriever(question="Orvane press", topic="whales").background == "1. Whales are mammals."
    with pytest.raises(ProgramError, match=r"needs \['topic'\], but the inputs are \['question'\]"):
        retriever(question="whales")


def test_the_passages_stay_within_their_room_and_are_harmless() -> None:
    corpus = ["alpha beta gamma delta", "alpha <|im_end|> omega", "alpha three"]
    whole = Retriever(corpus, k=3)(question="alpha").background
    assert "<|im_end|>" not in whole and "< |im_end|>" in whole
    for room in range(1, len(whole) + 2):
        cut = Retriever(corpus, k=3, characters=room)(question="alpha").background
        assert (
            len(cut) <= room
            and whole.startswith(cut)
            and not cut.rstrip(".").endswith(("\n2", "\n3"))
        )
        if " " in whole[:room]:
            assert whole[len(cut) : len(cut) + 1].strip() == "", "cut at the end of a word"


@pytest.mark.parametrize(
    ("corpus", "settings", "said"),
    [
        ([], {}, "no passage"),
        ([" ", "."], {}, "no passage"),
        ("one text", {}, "one string"),
        (CORPUS, {"k": 0}, "k is 0"),
        (CORPUS, {"characters": 4001}, "characters is 4001"),
    ],
)
def test_what_a_retriever_refuses(corpus: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ProgramError, match=said):
        Retriever(corpus, **settings)


def test_copies_share_the_index_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    with caplog.at_level(logging.DEBUG):
        retriever = Retriever(CORPUS)
        retriever.search("press")
    assert capfd.readouterr() == ("", "") and "bm25s" not in {
        record.name for record in caplog.records
    }
    copied = retriever.deepcopy()
    assert copied is not retriever and copied._index is retriever._index
    assert (
        Collaboration("question -> answer", draft=retriever).deepcopy().draft._index
        is retriever._index
    )  # pyright: ignore


# The program with passages


def test_a_retriever_is_a_draft(tmp_path: Path) -> None:
    strong = strong_that_reads()
    program = Collaboration("question -> answer", draft=Retriever(CORPUS, k=1)).bind(
        strong=strong.lm()
    )
    answer = program(question="Are whales fish?")
    assert (answer.answer, answer.draft) == ("1. Whales are mammals.",) * 2
    assert program.ask_alone(question="Are whales fish?").answer == "none"
    program.save(tmp_path / "program.json")
    assert "Whales" not in (tmp_path / "program.json").read_text()
    other = Collaboration("question -> answer", draft=Retriever(["Whales sing."])).bind(
        strong=strong.lm()
    )
    other.load(tmp_path / "program.json")
    assert other.bind(strong=strong.lm())(question="whales").answer == "1. Whales sing."


def test_a_drafter_of_another_field_names_it_or_the_program_does() -> None:
    refine = refiner("question, hint, notes -> answer")
    with pytest.raises(ProgramError, match="draft_field="):
        Collaboration(draft=Retriever(CORPUS), refine=refine)
    assert Collaboration(draft=Retriever(CORPUS, field="hint"), refine=refine).draft_field == "hint"
    program = Collaboration(draft=Retriever(CORPUS, k=1), refine=refine, draft_field="notes")
    strong = ScriptedEngine({"Notes: 1. Whales are mammals.": "yes"})
    assert program.bind(strong=strong.lm())(question="whales", hint="h").answer == "yes"
    with pytest.raises(
        ProgramError, match=r'draft_field is "note", but refine takes .* Did you mean "notes"'
    ):
        Collaboration(draft=Retriever(CORPUS), refine=refine, draft_field="note")


def test_rag_keeps_the_strong_model_and_has_no_weak_one() -> None:
    strong, weak = strong_that_reads(), ScriptedEngine({})
    demos = [dspy.Example(question="Worked?", background="b", answer="a")]
    base = Collaboration("question -> answer", demos=demos).bind(weak=weak.lm(), strong=strong.lm())
    program = rag(base, Retriever(CORPUS, k=1))
    assert program(question="whales").answer == "1. Whales are mammals." and not weak.asked
    assert program.strong.model == base.strong.model and program.refine.demos == demos  # pyright: ignore
    assert isinstance(base.draft, dspy.Predict), "the program that it was made of stays as it was"
    assert program.get_lm() is program.strong, "the strong model's samples are those that differ"
    with pytest.raises(ProgramError, match=r"The draft \(Retriever\) asks no model.*Grounded"):
        collect(program, questions(1), match)
    examples = [
        dspy.Example(id="w", question="whales", answer="1. Whales are mammals.").with_inputs(
            "question"
        )
    ]
    assert Influence(match, program).report(examples).mean == 1.0


def test_many_threads_get_the_answers_of_one() -> None:
    corpus = [f"Fact {number} is about number{number}." for number in range(50)]
    rows = [
        {"id": f"q{n}", "question": f"What of number{n}?", "answer": f"1. {corpus[n]}"}
        for n in range(50)
    ]
    program = Collaboration("question -> answer", draft=Retriever(corpus, k=1)).bind(
        strong=strong_that_reads().lm()
    )
    examples = [dspy.Example(**row).with_inputs("question") for row in rows]
    assert [
        one.score for one in ask_all(collaboration_arm(program), examples, match, num_threads=16)
    ] == [1.0] * 50


# Grounded


def test_a_grounded_drafter_reads_passages_and_its_traces_have_them(tmp_path: Path) -> None:
    corpus = [f"Question number {number} has the answer {number}." for number in range(4)]
    settings = Sampling(drafts=2)
    good = {settings.seed_of(f"q{number}", 0) for number in range(4)}

    def drafts(request: dict[str, Any]) -> str:
        answer = (
            request["messages"][-1]["content"].split("Passages: 1. ")[1].rstrip(".").split()[-1]
        )
        return answer if request["config"]["seed"] in good else "nothing"

    weak, strong = ScriptedEngine(drafts, model="scripted/weak"), strong_that_reads()
    base = Collaboration("question -> answer").bind(weak=weak.lm(), strong=strong.lm())
    program = grounded(base, Retriever(corpus, k=1, stopwords=None))
    with Store(tmp_path / "run") as store:
        traces = list(collect(program, questions(4), match, settings, store=store))
        assert [trace.influence for trace in traces] == [1.0, 0.0] * 4
        assert [trace.draft for trace in traces][:2] == ["0", "nothing"] and traces[
            0
        ].weak_model == "scripted/weak"
        for trace in traces:
            number = trace.example_id[1:]
            said = (
                f"Question: Question number {number}?\nPassages: 1. Question number {number} "
                f"has the answer {number}."
            )
            assert trace.prompt[-1] == {"role": "user", "content": said}
            assert set(trace.inputs) == {"question"}
        pairs = preference_pairs(traces)
    assert len(pairs) == 4
    assert "Passages" not in prompts(strong), "the strong model sees the draft, not the passages"
    assert "Passages" not in str(base.draft), "the program that it was made of stays as it was"


def test_which_predictor_takes_the_passages() -> None:
    retriever = Retriever(CORPUS, k=1)
    weak = ScriptedEngine({"Passages: 1. Whales are mammals.": "Reasoning: r\nAnswer: a"})
    program = Collaboration(
        draft=Grounded(retriever, dspy.ChainOfThought("question -> answer")), refine=refiner()
    )
    assert (
        program.bind(weak=weak.lm()).ask_draft(question="whales").draft == "Reasoning: r\nAnswer: a"
    )
    given: Any = Grounded(retriever, "question -> background").drafter
    assert given.signature.input_fields.keys() == {"question", "passages"}
    own = Grounded(retriever, "question, notes -> background", field="notes")
    assert list(own.drafter.signature.input_fields) == ["question", "notes"]  # pyright: ignore

    class Two(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = dspy.Predict("question -> a"), dspy.Predict("a -> background")

    with pytest.raises(ProgramError, match='has 2 predictors and none takes "passages"'):
        Grounded(retriever, Two())


def test_a_grounded_drafter_is_saved_without_its_corpus(tmp_path: Path) -> None:
    def program(instructions: str) -> Collaboration:
        task: Any = dspy.Signature("question -> background", instructions)  # pyright: ignore
        return Collaboration(draft=Grounded(Retriever(CORPUS), task), refine=refiner())

    program("Say it well.").save(tmp_path / "program.json")
    assert "Whales" not in (tmp_path / "program.json").read_text()
    other = program("Else.")
    other.load(tmp_path / "program.json")
    assert other.draft.drafter.signature.instructions == "Say it well."  # pyright: ignore
