"""Rounds: a tuned model is taken only when held-out examples say so; every step once; and all of it
as a DSPy optimiser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from round_parts import (  # noqa: F401 - fixtures
    ALWAYS,
    NEVER,
    VOWELS,
    examples,
    match,
    optimizer,
    rules,
    strong_that_counts,
    student,
    taught,
)
from scripted import strong_that_reads, weak_that_obeys

from cowest_dspy import KTO, SFT, Collaboration, CoWest, Store, tune
from cowest_dspy.errors import DataError, PairsError, ProgramError, TuningError
from cowest_dspy.optimizers.rounds import Round, decide, gain
from cowest_dspy.pairs import UnpairedPreferences
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.store.record import unrecorded
from cowest_dspy.tuning.provider import LEAST_PAIRS

# Deciding


def test_a_round_and_tune_ask_for_equally_many_pairs() -> None:
    assert PairRules.model_validate({}).least == LEAST_PAIRS == 8


def test_too_few_examples_say_nothing() -> None:
    assert decide(gain({"q": 0.0}, {"q": 1.0}), rules()).accepted is False
    assert decide(gain({}, {}), rules()).reason.startswith("the gain is not known")


# Rounds of a real model


def test_a_compiled_program_has_another_weak_model_and_the_student_has_not(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1

    weak, count = student.weak.model, Count()
    better = optimizer(trainer_callbacks=[count], **ALWAYS).compile(
        student, trainset=examples("train", 10), valset=examples("dev", 4)
    )
    assert count.steps == 2, "its training has called what it was given"
    (one,) = better.rounds
    assert (
        one.accepted and one.model == better.weak.model != weak == student.weak.model == one.start
    )
    assert better.strong.model == student.strong.model
    assert one.gain is not None and one.gain.examples == 4 and one.pairs >= 2
    assert (better.log_dir / "adapters").is_dir() and better._compiled and not student._compiled
    assert better(question="dev 1?").answer in ("yes", "no")
    assert Round.from_dict({**vars(one), "gain": vars(one.gain)}) == one


def test_a_second_round_is_on_policy_and_may_replay_the_first(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    made = optimizer(count=2, replay=True, **ALWAYS).compile(
        student, trainset=examples("train", 10), valset=examples("dev", 4)
    )
    first, second = made.rounds
    assert second.start == first.model
    with Store(made.log_dir) as store:
        models = {
            record["round"]: record["weak_model"] for record in store.records("trace").values()
        }
        assert models == {1: student.weak.model, 2: first.model}
        assert set(store.records("adapter")) == {"dpo", "dpo 2"}
    assert (
        second.replayed == first.pairs
        and second.pairs > first.pairs
        and second.model == made.weak.model
    )


def test_a_finished_run_is_only_read(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    train, dev = examples("train", 10), examples("dev", 4)
    first = optimizer(count=2, **ALWAYS).compile(student, trainset=train, valset=dev)
    with Store(first.log_dir) as store:
        calls = store.calls()
    again = optimizer(count=2, **ALWAYS).compile(student, trainset=train, valset=dev)
    assert again.rounds == first.rounds and again.weak.model == first.weak.model
    with Store(first.log_dir) as store:
        assert store.calls() == calls
    fewer = optimizer(count=1, **ALWAYS).compile(student, trainset=train, valset=dev)
    assert fewer.rounds == first.rounds[:1]
    with Store(first.log_dir) as store:
        assert {record["round"] for record in store.records("trace").values()} == {1}
        assert set(store.records("round")) == {"1"}


def test_without_a_valset_a_fifth_of_the_trainset_decides(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    made = optimizer(**ALWAYS).compile(student, trainset=examples("train", 15))
    found = made.rounds[0].gain
    assert found is not None and found.examples == 3
    with Store(made.log_dir) as store:
        assert len({record["example_id"] for record in store.records("trace").values()}) == 12


def test_sft_on_the_chosen_drafts_is_a_tuner_too(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    settings = SFT(
        max_steps=2,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
    )
    made = optimizer(tuner=settings, **ALWAYS).compile(
        student, trainset=examples("train", 10), valset=examples("dev", 4)
    )
    assert (
        made.rounds[0].model not in (None, student.weak.model)
        and made.rounds[0].start == student.weak.model
    )


def test_kto_learns_from_labelled_drafts_that_need_no_pair(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    settings = KTO(
        max_steps=2,
        bf16=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
    )
    # The strong model alone says no: where that is right, a draft with many vowels hurts.
    wrong = [
        dspy.Example(**{**one.toDict(), "answer": "no"}).with_inputs("question")
        for one in examples("other", 8)
    ]
    train = [*examples("train", 8), *wrong]
    made = optimizer(tuner=settings, count=2, replay=True, **ALWAYS).compile(
        student, trainset=train, valset=examples("dev", 4)
    )
    first = made.rounds[0]
    assert first.model not in (None, student.weak.model) and first.pairs >= 2
    with Store(made.log_dir) as store:
        assert set(store.records("adapter")) <= {"kto", "kto 2"} and store.record("adapter", "kto")
    rows = [json.loads(line) for line in (made.log_dir / "drafts.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {True, False}


def labelled_by(examples: list[dspy.Example], answer: str) -> list[dspy.Example]:
    """The same questions with another answer: where it is "no", the strong model alone is right,
    and vowels hurt."""
    return [
        dspy.Example(**{**one.toDict(), "answer": answer}).with_inputs("question")
        for one in examples
    ]


QUICK_KTO = KTO(
    max_steps=2,
    bf16=False,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=1e-3,
)


@pytest.mark.slow
def test_kto_trains_the_second_round_on_the_labelled_drafts_of_both(
    student: Collaboration, optimizer: Callable[..., CoWest], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[list[dict[str, Any]]] = []

    def watched(start: dspy.LM, rows: list[dict[str, Any]], *others: Any, **options: Any) -> Any:
        trained.append(rows)
        return tune(start, rows, *others, **options)

    monkeypatch.setattr("cowest_dspy.optimizers.run.tune", watched)
    train = [*examples("train", 8), *labelled_by(examples("other", 8), "no")]
    held = examples("dev", 4)
    made = optimizer(tuner=QUICK_KTO, count=2, replay=True, **ALWAYS).compile(
        student, trainset=train, valset=held
    )
    first, second = made.rounds
    of_first, of_second = (
        UnpairedPreferences.load(made.log_dir / name).rows()
        for name in ("drafts.jsonl", "drafts-2.jsonl")
    )
    plain = [
        [{key: row[key] for key in ("prompt", "completion", "label")} for row in rows]
        for rows in (of_first, of_second)
    ]
    assert trained == [plain[0], plain[0] + plain[1]]
    assert (first.pairs, first.replayed, second.pairs, second.replayed) == (
        len(of_first), 0, len(of_first) + len(of_second), len(of_first),
    )  # fmt: skip
    assert (
        {row["weak_model"] for row in of_second}
        == {first.model}
        != {row["weak_model"] for row in of_first}
    )
    alone = optimizer("dropped", tuner=QUICK_KTO, count=2, **ALWAYS).compile(
        student, trainset=train, valset=held
    )
    assert trained[2:] == plain and [one.replayed for one in alone.rounds] == [0, 0], (
        "without replay each has its own"
    )


def test_kto_says_what_labelled_drafts_it_lacks(
    student: Collaboration, optimizer: Callable[..., CoWest], tmp_path: Path
) -> None:
    train, held = examples("train", 8), examples("dev", 2)
    advice = r"Sample more drafts \(raise drafts\), at a higher temperature, or on more examples"
    with pytest.raises(
        PairsError,
        match=rf"Too few labelled drafts for KTO: \d+ drafts helped and 0 hurt.*{advice}\..* "
        r"At least 1000 are needed \(least\)",
    ):
        optimizer("few", tuner=QUICK_KTO, least=1000).compile(student, trainset=train, valset=held)
    needs = "KTO needs drafts that helped and drafts that hurt: "
    with pytest.raises(
        PairsError,
        match=rf"{needs}[1-9]\d* drafts helped and 0 hurt.*{advice}; or tune with SFT, or with DPO",
    ):
        optimizer("helped", tuner=QUICK_KTO).compile(student, trainset=train, valset=held)
    with pytest.raises(PairsError, match=rf"{needs}0 drafts helped and [1-9]\d* hurt.*{advice}\."):
        optimizer("hurt", tuner=QUICK_KTO).compile(
            student, trainset=labelled_by(train, "no"), valset=held
        )
    for name in ("few", "helped", "hurt"):
        with Store(tmp_path / name) as store:
            assert not store.records("adapter") and not store.records("round")
    assert (tmp_path / "hurt" / "drafts.jsonl").read_text().count('"label": false') >= 2, (
        "what there was can be read"
    )


def test_what_cannot_be_optimised_says_why(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    train = examples("train", 4)
    with pytest.raises(ProgramError, match="weak"):
        optimizer().compile(Collaboration("question -> answer"), trainset=train)
    scripted = student.bind(weak=weak_that_obeys().lm(), strong=strong_that_reads().lm())
    with pytest.raises(TuningError, match="cannot be tuned here"):
        optimizer().compile(scripted, trainset=train)
    with pytest.raises(DataError, match="There are no examples"):
        optimizer().compile(student, trainset=[])
    with pytest.raises(PairsError, match="preference pair"):
        optimizer("few").compile(student, trainset=examples("train", 1), valset=examples("dev", 2))
    with pytest.raises(PairsError, match=r"held out|tested|dev"):
        optimizer("same").compile(student, trainset=train, valset=train)


def test_an_unrecorded_weak_model_can_be_trained_further(student: Collaboration) -> None:
    assert unrecorded(student.weak).provider.finetunable
