"""Rounds: a tuned model is taken only when held-out examples say so; every step once; and all of it as a DSPy optimiser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as some
from test_influence_laws import strong_that_reads
from test_optimizers import weak_that_obeys

from cowest_dspy import DPO, KTO, SFT, Collaboration, CoWest, LineAdapter, Store, TransformersEngine, tunable, tune
from cowest_dspy.errors import DataError, PairsError, ProgramError, TuningError
from cowest_dspy.lms.recording import unrecorded
from cowest_dspy.pairs import LabelledDrafts
from cowest_dspy.rounds import Decision, Round, decide, gain
from cowest_dspy.tables import PairRules, RoundRules
from cowest_dspy.testing import ScriptedEngine

VOWELS = 3
ALWAYS, NEVER = {"least_gain": -1.0}, {"least_gain": 1.0}


def rules(**values: Any) -> RoundRules:
    return RoundRules.model_validate(values)


# Deciding


def test_law_9_what_does_not_help_on_held_out_examples_is_rolled_back() -> None:
    before = {f"q{i}": float(i % 2) for i in range(40)}
    assert decide(gain(before, dict.fromkeys(before, 1.0)), rules()).accepted
    for after in (before, dict.fromkeys(before, 0.0), {**before, "q0": 1.0}):
        made = decide(gain(before, after), rules())
        assert not made.accepted and "interval" in made.reason
    assert "below 0" in decide(gain(before, dict.fromkeys(before, 0.0)), rules()).reason


def test_law_3_failures_are_no_scores_and_more_of_them_are_no_gain() -> None:
    before: dict[str, float | None] = {f"q{i}": 0.0 for i in range(40)}
    after: dict[str, float | None] = {name: 1.0 if place > 9 else None for place, name in enumerate(before)}
    found = gain(before, after)
    assert (found.n, found.mean, found.failed_after, found.better) == (30, 1.0, 10, 30)
    made = decide(found, rules())
    assert made == Decision(False, made.reason) and "fails on 10 of 40 examples, 10 more than before" in made.reason
    assert decide(found, rules(more_failures=0.25)).accepted


def test_law_8_the_order_of_examples_changes_no_interval() -> None:
    before = {f"q{i}": float(i % 3 == 0) for i in range(57)}
    after = {name: float(place % 5 > 1) for place, name in enumerate(before)}
    turned = gain(dict(reversed(before.items())), dict(sorted(after.items())))
    assert gain(before, after) == turned


def test_too_few_examples_say_nothing() -> None:
    assert decide(gain({"q": 0.0}, {"q": 1.0}), rules()).accepted is False
    assert decide(gain({}, {}), rules()).reason.startswith("the gain is not known")


@given(some.lists(some.tuples(some.sampled_from([0.0, 0.5, 1.0, None]), some.sampled_from([0.0, 0.5, 1.0, None])), max_size=30))
def test_law_9_nothing_is_taken_that_is_not_better(scores: list[tuple[float | None, float | None]]) -> None:
    before = {str(place): one for place, (one, _) in enumerate(scores)}
    after = {str(place): other for place, (_, other) in enumerate(scores)}
    found = gain(before, after)
    assert not (decide(found, rules()).accepted and decide(gain(after, before), rules()).accepted)
    if decide(found, rules()).accepted:
        assert (found.mean is not None and found.mean > 0 and found.better > found.worse) or (found.mean and found.mean > 0)
    assert found.n <= found.examples == len(scores)


# Rounds of a real model


def strong_that_counts(request: dict[str, Any]) -> str:
    """Says yes to a background with enough different vowels in it; alone it says no."""
    text = request["messages"][-1]["content"]
    return "yes" if len(set("aeiou") & set(text.partition("Background: ")[2])) >= VOWELS else "no"


def match(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    return float(prediction.answer == example.answer)


def examples(name: str, count: int) -> list[dspy.Example]:
    return [dspy.Example(question=f"{name} {i}?", answer="yes").with_inputs("question") for i in range(count)]


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dspy.LM:
    """A tiny weak model that has learned to write a few letters, some with more vowels than others."""
    texts = ["a e i", "b c d", "o u a", "x"]
    rows = [
        {"prompt": [{"role": "user", "content": f"Question: {i}?"}], "completion": [{"role": "assistant", "content": text}]}
        for i in range(4)
        for text in texts
    ]
    settings = SFT(max_steps=80, epochs=80, learning_rate=2e-2, precision="fp32")
    weak = tunable(TransformersEngine(tiny_model).lm(temperature=0.0, max_tokens=12))
    return tune(weak, rows, "sft", settings, tmp_path_factory.mktemp("taught") / "adapter").lm


@pytest.fixture
def student(taught: dspy.LM) -> Collaboration:
    strong = ScriptedEngine(strong_that_counts, model="scripted/strong").lm()
    return Collaboration("question -> answer", adapter=LineAdapter()).bind(weak=taught, strong=strong)


@pytest.fixture
def optimizer(tmp_path: Path) -> Callable[..., CoWest]:
    def make(folder: str = "run", **values: Any) -> CoWest:
        tuner = values.pop("tuner", DPO(max_steps=2, precision="fp32", batch_size=2))
        gate = PairRules.model_validate({"least": values.pop("least", 2)})
        return CoWest(match, tuner, 6, rules(**values), pairs=gate, max_failed=1.0, run=tmp_path / folder)

    return make


def test_a_compiled_program_has_another_weak_model_and_the_student_has_not(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    weak = student.weak.model
    better = optimizer(**ALWAYS).compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    (one,) = better.rounds
    assert one.accepted and one.model == better.weak.model != weak == student.weak.model == one.start
    assert better.strong.model == student.strong.model
    assert one.gain is not None and one.gain.examples == 4 and one.pairs >= 2
    assert (better.run / "adapters").is_dir() and better._compiled and not student._compiled
    assert better(question="dev 1?").answer in ("yes", "no")
    assert Round.from_dict({**vars(one), "gain": vars(one.gain)}) == one


def test_law_9_a_round_that_was_rolled_back_leaves_the_model_as_it_was(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    same = optimizer(count=3, **NEVER).compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    (one,) = same.rounds
    assert (not one.accepted and "does not lie above 1" in one.reason) or "below 1" in one.reason
    assert same.weak.model == student.weak.model
    patient = optimizer(count=2, patience=2, **NEVER).compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    assert [one.accepted for one in patient.rounds] == [False, False]
    assert patient.rounds[1].start == student.weak.model


def test_a_second_round_is_on_policy_and_may_replay_the_first(student: Collaboration, optimizer: Callable[..., CoWest]) -> None:
    made = optimizer(count=2, replay=True, **ALWAYS).compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    first, second = made.rounds
    assert second.start == first.model
    with Store(made.run) as store:
        models = {record["round"]: record["weak_model"] for record in store.records("trace").values()}
        assert models == {1: student.weak.model, 2: first.model}
        assert set(store.records("adapter")) == {"dpo", "dpo 2"}
    assert second.replayed == first.pairs and second.pairs > first.pairs and second.model == made.weak.model


def test_a_finished_run_is_only_read(student: Collaboration, optimizer: Callable[..., CoWest]) -> None:
    train, dev = examples("train", 10), examples("dev", 4)
    first = optimizer(count=2, **ALWAYS).compile(student, trainset=train, valset=dev)
    with Store(first.run) as store:
        calls = store.calls()
    again = optimizer(count=2, **ALWAYS).compile(student, trainset=train, valset=dev)
    assert again.rounds == first.rounds and again.weak.model == first.weak.model
    with Store(first.run) as store:
        assert store.calls() == calls
    fewer = optimizer(count=1, **ALWAYS).compile(student, trainset=train, valset=dev)
    assert fewer.rounds == first.rounds[:1]
    with Store(first.run) as store:
        assert {record["round"] for record in store.records("trace").values()} == {1}
        assert set(store.records("round")) == {"1"}


def test_without_a_valset_a_fifth_of_the_trainset_decides(student: Collaboration, optimizer: Callable[..., CoWest]) -> None:
    made = optimizer(**ALWAYS).compile(student, trainset=examples("train", 15))
    found = made.rounds[0].gain
    assert found is not None and found.examples == 3
    with Store(made.run) as store:
        assert len({record["example_id"] for record in store.records("trace").values()}) == 12


def test_sft_on_the_chosen_drafts_is_a_tuner_too(student: Collaboration, optimizer: Callable[..., CoWest]) -> None:
    settings = SFT(max_steps=2, precision="fp32", batch_size=2, learning_rate=1e-3)
    made = optimizer(tuner=settings, **ALWAYS).compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    assert made.rounds[0].model not in (None, student.weak.model) and made.rounds[0].start == student.weak.model


def test_kto_learns_from_labelled_drafts_that_need_no_pair(student: Collaboration, optimizer: Callable[..., CoWest]) -> None:
    settings = KTO(max_steps=2, precision="fp32", batch_size=4, learning_rate=1e-3)
    # The strong model alone says no: where that is right, a draft with many vowels hurts.
    wrong = [dspy.Example(**{**one.toDict(), "answer": "no"}).with_inputs("question") for one in examples("other", 8)]
    train = [*examples("train", 8), *wrong]
    made = optimizer(tuner=settings, count=2, replay=True, **ALWAYS).compile(student, trainset=train, valset=examples("dev", 4))
    first = made.rounds[0]
    assert first.model not in (None, student.weak.model) and first.pairs >= 2
    with Store(made.run) as store:
        assert set(store.records("adapter")) <= {"kto", "kto 2"} and store.record("adapter", "kto")
    rows = [json.loads(line) for line in (made.run / "drafts.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {True, False}


def labelled_by(examples: list[dspy.Example], answer: str) -> list[dspy.Example]:
    """The same questions with another answer: where it is "no", the strong model alone is right, and vowels hurt."""
    return [dspy.Example(**{**one.toDict(), "answer": answer}).with_inputs("question") for one in examples]


QUICK_KTO = KTO(max_steps=2, precision="fp32", batch_size=4, learning_rate=1e-3)


def test_kto_trains_the_second_round_on_the_labelled_drafts_of_both(
    student: Collaboration, optimizer: Callable[..., CoWest], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[list[dict[str, Any]]] = []

    def watched(start: dspy.LM, rows: list[dict[str, Any]], *others: Any, **options: Any) -> Any:
        trained.append(rows)
        return tune(start, rows, *others, **options)

    monkeypatch.setattr("cowest_dspy.trained.tune", watched)
    train = [*examples("train", 8), *labelled_by(examples("other", 8), "no")]
    held = examples("dev", 4)
    made = optimizer(tuner=QUICK_KTO, count=2, replay=True, **ALWAYS).compile(student, trainset=train, valset=held)
    first, second = made.rounds
    of_first, of_second = (LabelledDrafts.load(made.run / name).rows() for name in ("drafts.jsonl", "drafts-2.jsonl"))
    plain = [[{key: row[key] for key in ("prompt", "completion", "label")} for row in rows] for rows in (of_first, of_second)]
    assert trained == [plain[0], plain[0] + plain[1]]
    assert (first.pairs, first.replayed, second.pairs, second.replayed) == (
        len(of_first), 0, len(of_first) + len(of_second), len(of_first),
    )  # fmt: skip
    assert {row["weak_model"] for row in of_second} == {first.model} != {row["weak_model"] for row in of_first}
    alone = optimizer("dropped", tuner=QUICK_KTO, count=2, **ALWAYS).compile(student, trainset=train, valset=held)
    assert trained[2:] == plain and [one.replayed for one in alone.rounds] == [0, 0], "without replay each has its own"


def test_kto_says_what_labelled_drafts_it_lacks(student: Collaboration, optimizer: Callable[..., CoWest], tmp_path: Path) -> None:
    train, held = examples("train", 8), examples("dev", 2)
    advice = r"Sample more drafts \(\[collect\] drafts\), at a higher temperature, or on more examples"
    with pytest.raises(
        PairsError,
        match=rf"Too few labelled drafts for KTO: \d+ drafts helped and 0 hurt.*{advice}\. \[pairs\] least asks for 1000",
    ):
        optimizer("few", tuner=QUICK_KTO, least=1000).compile(student, trainset=train, valset=held)
    needs = "KTO needs drafts that helped and drafts that hurt: "
    with pytest.raises(PairsError, match=rf"{needs}[1-9]\d* drafts helped and 0 hurt.*{advice}; or tune with SFT, or with DPO"):
        optimizer("helped", tuner=QUICK_KTO).compile(student, trainset=train, valset=held)
    with pytest.raises(PairsError, match=rf"{needs}0 drafts helped and [1-9]\d* hurt.*{advice}\.$"):
        optimizer("hurt", tuner=QUICK_KTO).compile(student, trainset=labelled_by(train, "no"), valset=held)
    for name in ("few", "helped", "hurt"):
        with Store(tmp_path / name) as store:
            assert not store.records("adapter") and not store.records("round")
    assert (tmp_path / "hurt" / "drafts.jsonl").read_text().count('"label": false') >= 2, "what there was can be read"


def test_what_cannot_be_optimised_says_why(student: Collaboration, optimizer: Callable[..., CoWest]) -> None:
    train = examples("train", 4)
    with pytest.raises(ProgramError, match="CoWest tunes a Collaboration; a Predict was given"):
        optimizer().compile(dspy.Predict("question -> answer"), trainset=train)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProgramError, match="takes no teacher"):
        optimizer().compile(student, trainset=train, teacher=student)
    with pytest.raises(ProgramError, match="weak"):
        optimizer().compile(Collaboration("question -> answer"), trainset=train)
    scripted = student.bind(weak=weak_that_obeys().lm(), strong=strong_that_reads().lm())
    with pytest.raises(TuningError, match="cannot be tuned here"):
        optimizer().compile(scripted, trainset=train)
    with pytest.raises(DataError, match="There are no examples"):
        optimizer().compile(student, trainset=[])
    with pytest.raises(PairsError, match="preference pairs"):
        optimizer("few").compile(student, trainset=examples("train", 1), valset=examples("dev", 2))
    with pytest.raises(PairsError, match=r"held out|tested|dev"):
        optimizer("same").compile(student, trainset=train, valset=train)


def test_an_unrecorded_weak_model_can_be_trained_further(student: Collaboration) -> None:
    assert unrecorded(student.weak).provider.finetunable
