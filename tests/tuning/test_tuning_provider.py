"""Tuning behind a dspy.LM: tune, finetune, jobs, and DSPy's own BootstrapFinetune, on a real tiny
model."""

from __future__ import annotations

import copy
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.clients.utils_finetune import TrainDataFormat
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import LORA, QUICK, labelled, pair_rows, quick, says, sft_rows

from cowest_dspy import CoWest
from cowest_dspy.errors import ConfigError, PairsError, TuningError
from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.pairs import PreferencePairs
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.tuning import (
    DPO,
    KTO,
    SFT,
    Lora,
    PeakMemory,
    TRLProvider,
    TRLTrainingJob,
    TuningCancelled,
    data,
    tunable,
    tune,
)

# In DSPy


@pytest.fixture(scope="module")
def weak(tiny_model: Path) -> Iterator[dspy.LM]:
    engine = LocalEngine(tiny_model, dtype="float32")
    yield tunable(engine.lm(temperature=0.0, max_tokens=8))
    engine.close()


def test_tune_gives_an_lm_that_answers_with_the_new_weights(weak: dspy.LM, tmp_path: Path) -> None:
    settings = SFT(
        num_train_epochs=15,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        bf16=False,
        lora=Lora(r=16),
    )
    row = {"prompt": [says("user", "2 + 2?")], "completion": [says("assistant", "4 bar")]}
    before = weak("2 + 2?")
    tuned = tune(weak, [row] * 4, settings, tmp_path / "first")
    assert tuned.lm("2 + 2?") == ["4 bar"]
    assert weak("2 + 2?") == before != ["4 bar"]
    assert tuned.model == tuned.lm.model == f"{weak.model}+{tuned.result.adapter_hash}"
    # The next training goes on from the adapter that the model id names.
    further = tune(tuned.lm, [row] * 4, SFT(**QUICK), tmp_path / "second")
    assert further.result.history[0]["loss"] == pytest.approx(
        tuned.result.history[-1]["loss"], abs=0.01
    )
    assert further.result.history[0]["loss"] < 1 < tuned.result.history[0]["loss"]


def many_pairs() -> PreferencePairs:
    return PreferencePairs.from_dataset(pair_rows(8))


def test_tune_takes_pairs_and_datasets_of_them(weak: dspy.LM, tmp_path: Path) -> None:
    """Every way to give the same pairs makes the same weights."""
    pairs, settings = many_pairs(), DPO(**quick(lora=LORA))
    ways: tuple[Any, ...] = (pairs.rows(), pairs, pairs.to_dataset(), iter(pairs.rows()))
    models = {
        tune(weak, rows, settings, tmp_path / str(number)).model for number, rows in enumerate(ways)
    }
    assert len(models) == 1 and weak.model not in models


def test_pairs_are_tuned_on_by_every_tuner() -> None:
    """For SFT the chosen drafts, for KTO both sides, labelled; rows of one example stay together
    when some are held out."""
    pairs, rows = many_pairs(), pair_rows(8)
    assert data.check_rows(data.read_rows(pairs, "SFT"), "SFT") == [
        {"prompt": row["prompt"], "completion": row["chosen"]} for row in rows
    ]
    both = data.read_rows(pairs, "KTO")
    assert data.check_rows(both, "KTO") == data.check_rows(labelled(rows), "KTO")
    assert [row["example_id"] for row in both] == [str(n) for n in range(8) for _ in range(2)]
    assert data.read_rows(pairs, "DPO") == pairs.rows()


def test_settings_of_a_training_may_be_a_dictionary(weak: dspy.LM, tmp_path: Path) -> None:
    given = QUICK | {"max_steps": 1, "lora": {"r": 4, "lora_alpha": 8}}
    ways: dict[str, Any] = {"DPO": many_pairs(), "KTO": labelled(pair_rows(8)), "SFT": sft_rows()}
    kinds = {"DPO": DPO, "KTO": KTO, "SFT": SFT}
    for name, rows in ways.items():
        made = tune(weak, rows, given, tmp_path / name).model
        assert made == tune(weak, rows, kinds[name](**given), tmp_path / f"{name} object").model
    with pytest.raises(ConfigError, match=r'settings, fields of DPO: beat: there.*Did you.*"beta"'):
        tune(weak, many_pairs(), {"beat": 0.2}, tmp_path / "no")
    with pytest.raises(ConfigError, match=r"settings, fields of DPO: beta: .*greater than 0"):
        tune(weak, many_pairs(), {"beta": -1}, tmp_path / "no")


def test_tune_shows_a_bar_of_its_steps(
    weak: dspy.LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(name: str, **options: Any) -> str:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        tune(weak, many_pairs(), DPO(**quick(max_steps=2)), tmp_path / name, **options)
        return stream.getvalue()

    assert "2/2" in shown("shown", display_progress=True)
    assert "2/2" not in shown("not shown")


def test_tune_finds_what_it_has_done_and_refuses_another_training_in_its_folder(
    weak: dspy.LM, tmp_path: Path
) -> None:
    steps: list[int] = []

    def again(**changes: Any) -> Any:
        settings = SFT(**quick(**changes), lora=Lora(r=4))
        return tune(
            weak, sft_rows(), settings, tmp_path / "a", on_step=lambda step, *_: steps.append(step)
        )

    first = again()
    assert steps == [0, 1, 2]
    second = again()
    assert (second.model, second.result, steps) == (first.model, first.result, [0, 1, 2])
    assert repr(second) == repr(first)
    with pytest.raises(TuningError, match=r"other settings \(learning_rate\)\. It is not over"):
        again(learning_rate=1e-4)
    assert first.lm("2 + 2?") == second.lm("2 + 2?")


def test_a_trainer_callback_hears_of_the_training_and_may_end_it(
    weak: dspy.LM, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class StopAtThree(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: dict[str, float] | None = None,
            **_: Any,
        ) -> None:
            self.losses += [logs["loss"]] if logs and "loss" in logs else []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    watching = StopAtThree()
    settings = SFT(**quick(num_train_epochs=4), lora=Lora(r=4))
    tuned = tune(weak, sft_rows(), settings, tmp_path / "out", callbacks=[watching])
    assert watching.losses == [row["loss"] for row in tuned.result.history]
    assert len(watching.losses) == 3 and tuned.result.stopped_early
    chat: Any = "sft"
    options = {"settings": settings, "output": tmp_path / "job", "callbacks": [StopAtThree()]}
    job: Any = weak.finetune(sft_rows(), chat, options)
    assert job.result().model == tuned.model and job.tuned.stopped_early
    with pytest.raises(TuningError, match="Callbacks are objects of this process"):
        tune(weak, sft_rows(), settings, tmp_path / "two", processes=2, callbacks=[watching])
    with pytest.raises(TuningError, match="Callbacks are objects of this process"):
        CoWest(lambda *_: 0.0, SFT(), processes=2, trainer_callbacks=[watching])


def test_a_failure_of_tune_is_raised(weak: dspy.LM, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no preference rows"):
        tune(weak, [], DPO(), tmp_path / "out", least=0)
    with pytest.raises(
        TuningError, match=r"rejected are tuned on with DPO\(...\), but settings is SFT"
    ):
        tune(weak, pair_rows(), SFT(), tmp_path / "out")
    wrong: Any = "preferences"
    with pytest.raises(
        TuningError, match=r"data format 'preferences'.*Did you mean \"preference\""
    ):
        weak.finetune(pair_rows(), wrong, {"settings": DPO(), "output": tmp_path / "out"}).result()
    with pytest.raises(TuningError, match="its weights are not here"):
        tunable(dspy.LM("openai/gpt-5-mini"))
    with pytest.raises(TuningError, match="Use tunable"):
        tune(dspy.LM("openai/gpt-5-mini"), sft_rows(), SFT(), tmp_path / "out")


def test_fewer_pairs_than_the_floor_are_refused_in_python_with_the_words_of_a_toml(
    weak: dspy.LM, tmp_path: Path
) -> None:
    """A model was trained on one pair, where a TOML's run would have said that there are too
    few."""
    toml = at_least_words(PreferencePairs((), {"examples: all drafts had the same influence": 3}))
    with pytest.raises(
        PairsError,
        match=r"^Only 1 preference pair\. Sample more drafts .* At least 8 are needed \(least\)\.$",
    ) as few:
        tune(weak, pair_rows(1), DPO(**QUICK), tmp_path / "out")
    assert str(few.value).partition("Sample")[2] == toml.partition("Sample")[2]
    with pytest.raises(PairsError, match=r"At least 8 are needed \(least\)\."):
        tune(weak, labelled(pair_rows(3)), KTO(**QUICK), tmp_path / "out")
    preference: Any = "preference"
    job = weak.finetune(
        pair_rows(7), preference, {"settings": DPO(**QUICK), "output": tmp_path / "out"}
    )
    with pytest.raises(PairsError, match="Only 7 preference pairs"):
        job.result()
    assert not (tmp_path / "out").exists()


def at_least_words(pairs: PreferencePairs) -> str:
    with pytest.raises(PairsError) as few:
        pairs.check_enough(PairRules.model_validate({}).least)
    return str(few.value)


def test_finetune_gives_the_tuned_lm_and_raises_a_failure(weak: dspy.LM, tmp_path: Path) -> None:
    data = [{"messages": [*row["prompt"], *row["completion"]]} for row in sft_rows(4)]
    settings = QUICK | {"lora": {"r": 4, "lora_alpha": 8}}
    job = weak.finetune(
        data, TrainDataFormat.CHAT, {"settings": settings, "output": tmp_path / "out", "seed": 1}
    )
    assert isinstance(job, TRLTrainingJob)
    assert job.result().model.endswith(adapter_hash(tmp_path / "out"))
    assert (job.status().state, job.status().step, job.status().total) == ("done", 1, 1)
    assert job.tuned is not None and job.tuned.history[0]["loss"] == job.status().logs["loss"]
    failed = weak.finetune(data, TrainDataFormat.CHAT, {"learning_rate": 1e-4})
    with pytest.raises(TuningError, match="train_kwargs has no 'learning_rate'"):
        failed.result()
    assert isinstance(failed.exception(), TuningError)
    assert failed.status().state == "failed"  # pyright: ignore[reportAttributeAccessIssue]
    assert not job.cancel()


def test_only_the_last_assistant_message_of_a_chat_row_is_learnt() -> None:
    messages = [
        says("user", "a"),
        says("assistant", "b"),
        says("user", "c"),
        says("assistant", "d"),
    ]
    assert data.sft_rows([{"messages": messages}]) == [
        {"prompt": messages[:3], "completion": messages[3:]}
    ]
    with pytest.raises(TuningError, match="Row 0"):
        data.sft_rows([{"messages": messages[:3]}])
    with pytest.raises(TuningError, match="Row 0 is no chat row"):
        data.sft_rows([{"messages": messages[:1]}])
    with pytest.raises(TuningError, match='Row 0: "completion" must be'):
        data.sft_rows([{"prompt": messages}])


def test_a_cancelled_job_stops_at_the_next_step_and_saves_nothing(
    weak: dspy.LM, tmp_path: Path
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(step: int, total: int, logs: dict[str, float]) -> None:
        begun.set()
        assert go_on.wait(60)

    options = {
        "settings": SFT(**quick(num_train_epochs=50)),
        "output": tmp_path / "out",
        "on_step": wait,
    }
    job = weak.finetune(sft_rows(), "sft", options)  # pyright: ignore[reportArgumentType]
    assert begun.wait(60)
    assert job.status().state == "running"
    assert job.cancel()
    go_on.set()
    with pytest.raises(TuningCancelled):
        job.result(timeout=60)
    assert (job.status().state, job.status().step, job.status().total) == ("cancelled", 1, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_provider_is_copied_with_its_program_and_its_weights_are_not(weak: dspy.LM) -> None:
    assert isinstance(weak.provider, TRLProvider)
    assert copy.deepcopy(weak.provider) is weak.provider is copy.copy(weak.provider)
    program = dspy.Predict("question -> answer")
    program.lm = weak
    copied: Any = program.deepcopy()
    assert copied.lm.provider.engine is weak.provider.engine


def test_bootstrap_finetune_of_dspy_tunes_the_weak_model(weak: dspy.LM, tmp_path: Path) -> None:
    teach = tune(
        weak,
        [
            {
                "prompt": [says("system", "Answer."), says("user", f"Question: {n}?")],
                "completion": [says("assistant", "4 bar")],
            }
            for n in range(4)
        ],
        SFT(
            num_train_epochs=15,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            bf16=False,
            lora=Lora(r=16),
        ),
        tmp_path / "teacher",
    )
    student = dspy.Predict(dspy.make_signature("question -> answer", "Answer."))
    student.set_lm(weak)
    teacher = student.deepcopy()
    teacher.set_lm(teach.lm)

    def right(example: Any, made: Any, trace: Any = None) -> bool:
        return made.answer == example.answer

    train = [
        dspy.Example(question=f"{number}?", answer="4 bar").with_inputs("question")
        for number in range(4)
    ]
    options = {
        "settings": SFT(**quick(num_train_epochs=15, learning_rate=1e-2)),
        "output": tmp_path / "student",
    }
    with dspy.context(adapter=LineAdapter()):
        assert student(question="0?").answer != "4 bar"
        optimizer = dspy.BootstrapFinetune(metric=right, train_kwargs=options, num_threads=1)
        tuned: Any = optimizer.compile(student, trainset=train, teacher=teacher)
        assert tuned(question="0?").answer == "4 bar"
    assert tuned.lm.model == f"{weak.model}+{adapter_hash(tmp_path / 'student')}"


def test_bootstrap_finetune_ends_with_the_error_of_the_training(
    weak: dspy.LM, tmp_path: Path
) -> None:
    student = dspy.Predict("question -> answer")
    student.set_lm(weak)
    train = [
        dspy.Example(question=f"{number}?", answer="4 bar").with_inputs("question")
        for number in range(2)
    ]
    (tmp_path / "thesis.tex").write_text("years of work")
    optimizer = dspy.BootstrapFinetune(
        train_kwargs={"settings": SFT(**QUICK), "output": tmp_path}, num_threads=1
    )
    with (
        dspy.context(adapter=LineAdapter()),
        pytest.raises(TuningError, match="is not overwritten"),
    ):
        optimizer.compile(student, trainset=train, teacher=student.deepcopy())
    assert student.lm is weak


def test_peak_memory_sees_what_was_taken_in_between() -> None:
    with PeakMemory() as memory:
        before = memory.peak_bytes
        block = b"x" * 200_000_000
        threading.Event().wait(0.3)
        del block
    assert memory.peak_bytes >= before + 120_000_000
