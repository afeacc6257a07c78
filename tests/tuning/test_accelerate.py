"""Training by two processes on this CPU (gloo), started by ``accelerate launch``: equal to one
process, and gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerated import OF_PASSES, compared, launched, left, marked, nothing_is_left, task, trainers  # noqa: F401 - fixtures
from command_line import cowest
from round_parts import examples, match, student, taught  # noqa: F401 - fixtures
from tuning_rows import LORA, assert_close, kinds, quick, sft_rows

from cowest_dspy import CoWest, Cycle, Store
from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.tuning import DPO, KTO, SFT, launch, launching, provider
from cowest_dspy.tuning.launching import dealt_out

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

    with pytest.raises(TuningError, match="Process 1 of 2 was ended by SIGKILL"):
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


@pytest.mark.parametrize(
    ("settings", "processes", "micro"),
    [
        (SFT(per_device_train_batch_size=4, gradient_accumulation_steps=4), 2, 4),
        (SFT(per_device_train_batch_size=4, gradient_accumulation_steps=1), 2, 2),
        (SFT(per_device_train_batch_size=3, gradient_accumulation_steps=2), 2, 3),
        (SFT(per_device_train_batch_size=1, gradient_accumulation_steps=8), 4, 1),
        (DPO(per_device_train_batch_size=4, gradient_accumulation_steps=2, loss_type="aot"), 2, 2),
    ],
)
def test_a_batch_is_dealt_out_in_equal_parts(settings: Any, processes: int, micro: int) -> None:
    dealt = dealt_out(settings, processes)
    assert dealt == settings.model_copy(update={"micro_batch_size": micro})
    assert dealt.batch_size % (processes * micro) == 0


@pytest.mark.parametrize(
    ("settings", "processes", "says"),
    [
        (
            SFT(per_device_train_batch_size=4, gradient_accumulation_steps=1),
            3,
            "per_device_train_batch_size = 4, gradient_accumulation_steps = 1 cannot be dealt out to 3 processes",
        ),
        (
            SFT(per_device_train_batch_size=4, gradient_accumulation_steps=1),
            0,
            "cannot be dealt out to 0 processes",
        ),
        (
            SFT(per_device_train_batch_size=4, gradient_accumulation_steps=2),
            4,
            "Set micro_batch_size to a divisor of 2",
        ),
        (
            DPO(
                per_device_train_batch_size=4,
                gradient_accumulation_steps=1,
                loss_type=("sigmoid", "sft"),
            ),
            2,
            "the loss sft, which depends on the rows of a forward pass",
        ),
    ],
)
def test_a_batch_that_cannot_be_dealt_out_says_what_to_set(
    settings: Any, processes: int, says: str
) -> None:
    with pytest.raises(TuningError, match=says):
        dealt_out(settings, processes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (KTO(), "KTO compares the rows of a whole step: train with one process"),
        (SFT(held_out=0.25), "held_out works with one process only"),
        (SFT(report_to=("tensorboard",)), "report_to works with one process only"),
    ],
)
def test_what_needs_one_process_is_refused(settings: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=says):
        launch(settings, sft_rows(), 2, base="nowhere/at-all", output=tmp_path / "out")


def test_fewer_gpus_than_processes_are_an_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(TuningError, match="2 processes need a GPU each, and this machine has 1"):
        launched(tiny_model, tmp_path / "out")


def test_progress_is_told_once_and_only_of_whole_lines(tmp_path: Path) -> None:
    told: list[Any] = []
    file = tmp_path / "progress.jsonl"
    progress = launching.Progress(file, lambda *step: told.append(step))
    progress.tell()
    for text in ('[0, 2, {}]\n[1, 2, {"lo', 'ss": 0.5}]\n', ""):
        with file.open("a") as lines:
            lines.write(text)
        progress.tell()
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
            r"Process 1 of 2 failed:(\n  line){14}\n  odd shape$",
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
        raise launching._failure(tmp_path, 2, 7)


@pytest.mark.slow
def test_the_option_reaches_the_training(task: list[str]) -> None:
    said = cowest("cycle", *task, "--accelerate", "3", fails=True)
    assert said.startswith(
        "TuningError: per_device_train_batch_size = 4, gradient_accumulation_steps = 4 cannot be dealt out to 3 processes"
    )


def test_the_optimiser_sees_at_once_whether_its_tuner_can_be_dealt_out() -> None:
    with pytest.raises(
        TuningError,
        match="per_device_train_batch_size = 4, gradient_accumulation_steps = 1 cannot be dealt out to 3 processes",
    ):
        CoWest(
            match, DPO(per_device_train_batch_size=4, gradient_accumulation_steps=1), processes=3
        )
    with pytest.raises(
        TuningError, match="KTO compares the rows of a whole step: train with one process"
    ):
        CoWest(match, KTO(), processes=2)
    assert CoWest(match, KTO()).processes == 1


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
        rules = RoundRules.model_validate({"least_gain": -1.0})
        gate = PairRules.model_validate({"least": 2})
        optimizer = CoWest(match, tuner, 6, rules, pairs=gate, max_errors=1.0, processes=processes)
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
                launched.append(named["processes"].processes) or launch(*given, **named)
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
