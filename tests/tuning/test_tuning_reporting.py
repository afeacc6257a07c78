"""Where a training's logs go: nowhere by default, and to TRL's ``report_to`` when asked for; a
place that fails costs no training."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import LORA, QUICK, pair_rows, quick, sft_rows

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import DPO, SFT, train_adapter
from cowest_dspy.tuning import train as training


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("wandb", r"report_to wandb needs wandb: pip install 'cowest_dspy\[wandb\]'$"),
        ("tensorboard", r'"tensorboard", which is not installed\. Type pip install tensorboard'),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    named: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, named, None)
    # The base does not exist either, which would be found later.
    with pytest.raises(TuningError, match=message):
        train_adapter(
            SFT(**QUICK, report_to=(named,)),
            sft_rows(),
            base=str(tmp_path / "none"),
            output=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []


def integration(fails: str | None = None) -> type:
    """A stand-in for an integration of transformers, as it makes them: without arguments."""
    from transformers import TrainerCallback

    class Recording(TrainerCallback):
        made: list[Any] = []  # noqa: RUF012

        def __init__(self) -> None:
            self.name, self.logs, self.events = "", [], []
            self.made.append(self)

        def _note(self, event: str) -> None:
            self.events.append(event)
            if event == fails:
                raise ConnectionError("no server; key sk-abcdefghijklmnop1234")

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._note("begin")
            self.name = args.run_name

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            self._note("log")
            self.logs.append((state.global_step, dict(logs or {})))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._note("end")

    return Recording


def train(recording: type, base: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", recording)
    monkeypatch.setattr(training, "_check_reporters", lambda report_to: None)
    settings = DPO(
        **quick(num_train_epochs=2), lora=LORA, held_out=0.25, report_to=("tensorboard",)
    )
    return train_adapter(settings, pair_rows(8), base=str(base), output=output)


def test_an_integration_is_told_of_steps_and_evaluations(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording: Any = integration()
    tuned = train(recording, tiny_model, tmp_path / "r1", monkeypatch)
    (told,) = recording.made
    assert (told.events[0], told.events[-1], told.name) == ("begin", "end", "r1")
    for key in ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins"):
        expected = [(record["step"], record[key]) for record in tuned.history if key in record]
        assert [(step, logs[key]) for step, logs in told.logs if key in logs] == expected, key
        assert len(expected) >= 3
    assert sorted(path.name for path in tuned.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]


@pytest.mark.parametrize("event", ["log", "end"])
def test_a_place_that_fails_is_told_no_more_and_the_training_goes_on(
    event: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recording: Any = integration(fails=event)
    with caplog.at_level(logging.ERROR):
        tuned = train(recording, tiny_model, tmp_path / "r1", monkeypatch)
    assert recording.made[0].events.count(event) == 1 and tuned.path.is_dir()
    (said,) = [record.message for record in caplog.records if "report_to" in record.message]
    assert "Recording failed, and training goes on" in said and "sk-" not in said


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_finds_the_scalars_beside_the_adapter(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    settings = DPO(
        **quick(num_train_epochs=2), lora=LORA, held_out=0.25, report_to=("tensorboard",)
    )
    tuned = train_adapter(settings, pair_rows(8), base=str(tiny_model), output=tmp_path / "r1")
    (folder,) = (tmp_path / "r1.logs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    expected = [
        (record["step"], pytest.approx(record["loss"], abs=1e-6))
        for record in tuned.history
        if "loss" in record
    ]
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r1", "r1.logs"]
