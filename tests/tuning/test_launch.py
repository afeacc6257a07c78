"""Training by two processes on this CPU (gloo), started by ``accelerate launch``: equal to one
process, and gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from accelerated import OF_PASSES, compared, launched, left, marked, nothing_is_left, task, trainers  # noqa: F401 - fixtures
from command_line import cowest
from round_parts import (  # noqa: F401 - fixtures
    ALWAYS,
    examples,
    match,
    quick_cowest,
    student,
    taught,
)
from tuning_rows import LORA, assert_close, kinds, labelled_rows, quick

from cowest_dspy import CoWest, Cycle, Store
from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.tuning import (
    DPO,
    KTO,
    SFT,
    Processes,
    check_processes,
    launch,
    provider,
    train_adapter,
)
from cowest_dspy.tuning.launch import _failure, _report

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_two_processes_equal_one(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    train, make, data = kinds(7)[kind]
    # Seven rows and batches of four: a pass ends inside a batch. Two forward passes of one row
    # each, in each process.
    settings = make(
        **quick(
            num_train_epochs=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            warmup_steps=0.25,
        ),
        lora=LORA,
    )
    one = train(settings, data, base=str(tiny_model), output=tmp_path / "one", seed=5)
    told: list[tuple[int, int]] = []
    two = launch(
        settings,
        data,
        2,
        base=str(tiny_model),
        output=tmp_path / "two",
        seed=5,
        on_step=lambda step, total, _: told.append((step, total)),
    )
    assert_close(one.path, two.path, 1e-5)
    assert len(one.history) == 4 and [record.keys() for record in one.history] == [
        record.keys() for record in two.history
    ]
    for alone, together in zip(one.history, two.history, strict=True):
        assert compared(together) == pytest.approx(compared(alone), rel=1e-4, abs=1e-5)
    assert told == [(step, 4) for step in range(5)]
    assert (two.tokens, two.trained_rows, two.base_id, two.settings) == (
        one.tokens,
        one.trained_rows,
        one.base_id,
        one.settings,
    )
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one", "two"], (
        "the job's folder is gone"
    )


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_and_takes_the_others_with_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    def on_step(step: int, total: int, _: dict[str, float]) -> None:
        if step == 2:
            next(process for process in trainers() if process.environ().get("RANK") == "1").kill()

    with pytest.raises(
        TuningError,
        match=r"(?s)Training by 2 processes ended with exit code.*memory may have run out",
    ):
        launched(tiny_model, tmp_path / "out", on_step=on_step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_the_user_can_mend_is_told_as_by_one_process(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TuningError, match=r"^8 of 8 rows are longer than max_length, 5 tokens: row 0 has"
    ):
        launched(tiny_model, tmp_path / "out", settings={"max_length": 5})
    with pytest.raises(ModelError, match="adapter"):
        launched(tiny_model, tmp_path / "out", adapter=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_is_over_at_once(
    error: type[BaseException], tiny_model: Path, tmp_path: Path
) -> None:
    def on_step(step: int, total: int, _: dict[str, float]) -> None:
        if step == 1:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        launched(tiny_model, tmp_path / "out", on_step=on_step)
    assert list(tmp_path.iterdir()) == []


DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import accelerated

def on_step(step, total, logs):
    if step == 1:
        os.kill(os.getpid(), signal.SIGKILL)

accelerated.launched(Path(sys.argv[2]), Path(sys.argv[3]), on_step=on_step)
"""


@pytest.mark.slow
def test_nothing_outlives_a_killed_driver(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", DRIVER, str(SUPPORT), str(tiny_model), str(tmp_path / "out")]
    assert (
        subprocess.run(
            arguments, check=False, env={**os.environ, "PYTHONPATH": str(SUPPORT.parents[1])}
        ).returncode
        == -9
    )
    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["apo_zero_unpaired", "kto"])
def test_kto_held_out_rows_and_checkpoints_work_with_two_processes(
    loss_type: Literal["apo_zero_unpaired", "kto"], tiny_model: Path, tmp_path: Path
) -> None:
    settings = KTO(
        **quick(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            held_out=0.25,
            save_steps=1,
            load_best_model_at_end=False,
            loss_type=loss_type,
        ),
        lora=LORA,
    )
    given: dict[str, Any] = {"base": str(tiny_model), "output": tmp_path / "two", "seed": 5}

    def stop(step: int, total: int, _: dict[str, float]) -> None:
        if step == 5:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        launch(settings, labelled_rows(8), 2, on_step=stop, **given)
    began: list[int] = []
    two = launch(
        settings, labelled_rows(8), 2, on_step=lambda step, *_: began.append(step), **given
    )
    assert 0 < began[0] <= 5, "it has resumed"
    assert sum("eval_loss" in record for record in two.history) >= 3
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    if loss_type != "kto":  # TRL's estimate of the KL term is a mean over all processes' rows
        one = train_adapter(settings, labelled_rows(8), **{**given, "output": tmp_path / "one"})
        assert_close(one.path, two.path, 1e-4)


@pytest.mark.parametrize(
    ("settings", "processes", "says"),
    [
        (SFT(), 3, "gradient_accumulation_steps = 4 cannot be shared out to 3 processes"),
        (DPO(gradient_accumulation_steps=1), 2, "cannot be shared out to 2 processes"),
        (SFT(), 0, "0 processes cannot train"),
        (SFT(bf16=False), Processes(2, mixed_precision="bf16"), "mixed_precision: bf16, and"),
        (SFT(bf16=True), Processes(2, mixed_precision="fp16"), "mixed_precision: fp16, and"),
    ],
)
def test_a_step_that_cannot_be_shared_out_says_what_to_set(
    settings: Any, processes: Any, says: str
) -> None:
    with pytest.raises(TuningError, match=says):
        check_processes(settings, processes)


def test_a_step_that_can_be_shared_out_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for processes in (1, 2, 4, "2", Processes(2, mixed_precision="bf16")):
        check_processes(SFT(), processes)


def test_fewer_gpus_than_processes_are_an_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        TuningError, match="2 processes cannot train here: each needs a GPU, and this machine has 1"
    ):
        launched(tiny_model, tmp_path / "out")


def test_progress_is_told_once_and_only_of_whole_lines(tmp_path: Path) -> None:
    told: list[Any] = []
    file = tmp_path / "progress.jsonl"
    done = _report(file, 0, lambda *step: told.append(step))
    for text in ('[0, 2, {}]\n[1, 2, {"lo', 'ss": 0.5}]\n', ""):
        with file.open("a") as lines:
            lines.write(text)
        done = _report(file, done, lambda *step: told.append(step))
    assert told == [(0, 2, {}), (1, 2, {"loss": 0.5})]


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        (
            {
                "error-0.json": ("ValueError", "connection lost"),
                "error-1.json": ("ModelError", "no such base"),
            },
            ModelError,
            "^no such base$",
        ),
        (
            {"error-1.json": ("ValueError", "line\n" * 50 + "odd shape")},
            TuningError,
            r"(?s)exit code 7.*line.*odd shape",
        ),
        ({}, TuningError, r"(?s)exit code 7.*\n  no port; key \*\*\*$"),
    ],
)
def test_a_failure_is_told_by_its_cause(
    files: dict[str, Any], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    (tmp_path / "log.txt").write_text("starting\nno port; key sk-abcdefghijklmnop1234")
    for name, (error, text) in files.items():
        (tmp_path / name).write_text(json.dumps({"type": error, "text": text}))
    with pytest.raises(kind, match=says):
        raise _failure(tmp_path, 2, 7)


@pytest.mark.slow
def test_the_option_reaches_the_training(task: list[str]) -> None:
    said = cowest("cycle", *task, "--accelerate", "3", fails=True)
    assert said.startswith(
        "TuningError: gradient_accumulation_steps = 4 cannot be shared out to 3 processes"
    )


def test_the_optimiser_sees_at_once_whether_its_tuner_can_be_shared_out() -> None:
    with pytest.raises(TuningError, match="cannot be shared out to 3 processes"):
        CoWest(match, DPO(), processes=3)
    assert CoWest(match, KTO(), processes=2).processes == 2


@pytest.mark.slow
def test_the_optimiser_trains_with_two_processes_also_in_a_cycle(
    student: Any, tmp_path: Path
) -> None:
    tuner = DPO(
        max_steps=2,
        bf16=False,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
    )

    def trained(processes: int) -> tuple[Path, list[dict[str, float]]]:
        run = tmp_path / str(processes)
        optimizer = quick_cowest(tuner=tuner, processes=processes, **ALWAYS)
        cycle = Cycle(match, "weights", {"weights": optimizer}, log_dir=run)
        cycle.compile(student, trainset=examples("train", 10), valset=examples("dev", 3))
        with Store(run) as store:
            record = store.record("adapter", "dpo") or {}
        return run / record["folder"], record["history"]

    launched: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            provider,
            "launch",
            lambda *given, **named: (
                launched.append(named["processes"].count) or launch(*given, **named)
            ),
        )
        (one, alone), (two, together) = trained(1), trained(2)
    assert launched == [2]
    assert_close(one, two, 1e-5)
    assert [compared(record) for record in together] == [
        pytest.approx(compared(record), rel=1e-4, abs=1e-5) for record in alone
    ]


@pytest.mark.slow
def test_a_run_tunes_with_two_processes_and_is_read_by_one(task: list[str], tmp_path: Path) -> None:
    cowest("collect", *task)
    said = cowest("tune", *task, "--accelerate", "2")
    assert "tuned: local/" in said
    with Store(tmp_path / "run") as store:
        made = {name: len(record["history"]) for name, record in store.records("adapter").items()}
    assert sorted(made.values()) == [2, 80], (
        "fine-tuning and preference tuning, each with its steps"
    )
    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run/adapters").rglob("*.safetensors")
    }
    assert cowest("tune", *task).splitlines()[-1] == said.splitlines()[-1]
    assert before == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run/adapters").rglob("*.safetensors")
    }
