"""Where a training's logs go: nowhere by default, and into the run's folder when asked for."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from cowest_dspy.tuning.settings import REPORTERS
from pydantic import ValidationError
from tuning_rows import LORA, QUICK, pair_rows, quick, sft_rows

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import DPO, SFT, reporting, train_dpo, train_sft


def test_transformers_has_every_place_that_is_offered() -> None:
    from transformers.integrations import integration_utils

    assert set(REPORTERS) <= set(integration_utils.INTEGRATION_TO_CALLBACK)
    with pytest.raises(
        ValidationError, match=r'report_to has no "tensorbord"\. Did you mean "tensorboard"'
    ):
        SFT(report_to=("tensorbord",))
    with pytest.raises(ValidationError, match='report_to has no "all"'):
        SFT(report_to=("all",))


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    # The base does not exist either, which would be found later.
    with pytest.raises(
        TuningError, match=r'"mlflow", which is not installed\. Type pip install mlflow wandb'
    ):
        train_sft(
            SFT(**QUICK, report_to=("mlflow", "wandb")),
            sft_rows(),
            base=str(tmp_path / "none"),
            output=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []


def test_every_place_is_in_the_folder_of_the_logs_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("MLFLOW_TRACKING_URI", "TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", "mine")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt), reporting.places(REPORTERS, tmp_path / "r1"):  # noqa: PT012
        logs = tmp_path / "r1.logs"
        assert [os.environ[name] for name in names] == [
            f"sqlite:///{logs}/mlflow.db",
            f"{logs}/tensorboard",
            f"{logs}/trackio",
            "mine",
        ]
        raise KeyboardInterrupt
    assert dict(os.environ) == before
    with reporting.places((), tmp_path / "r2"):
        assert dict(os.environ) == before
    assert [path.name for path in tmp_path.iterdir()] == ["r1.logs"]


def integration() -> type:
    """A strict stand-in for an integration of transformers: it is made without arguments, begins,
    logs and ends, in this order."""
    from transformers import TrainerCallback

    class Recording(TrainerCallback):
        made: list[Any] = []  # noqa: RUF012

        def __init__(self) -> None:
            self.folder, self.name, self.logs, self.state = (
                os.environ["TENSORBOARD_LOGGING_DIR"],
                "",
                [],
                "made",
            )
            self.made.append(self)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert self.state == "made"
            self.state, self.name = "begun", args.run_name

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            assert self.state == "begun" and logs
            assert all(isinstance(value, (int, float)) for value in logs.values())
            self.logs.append((state.global_step, dict(logs)))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert self.state == "begun"
            self.state = "ended"

    return Recording


def test_an_integration_is_told_of_steps_and_evaluations(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    recording: Any = integration()
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", recording)
    monkeypatch.setattr(reporting, "check", lambda report_to: None)
    settings = DPO(
        **quick(num_train_epochs=2), lora=LORA, held_out=0.25, report_to=("tensorboard",)
    )
    tuned = train_dpo(settings, pair_rows(8), base=str(tiny_model), output=tmp_path / "r1")
    (told,) = recording.made
    assert (told.state, told.name, told.folder) == (
        "ended",
        "r1",
        str(tmp_path / "r1.logs" / "tensorboard"),
    )
    for key in (
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "kl",
        "eval_loss",
        "eval_rewards/margins",
        "eval_kl",
    ):
        kept = [(record["step"], record[key]) for record in tuned.history if key in record]
        assert [(step, logs[key]) for step, logs in told.logs if key in logs] == kept, key
        assert len(kept) >= 3
    assert sorted(path.name for path in tuned.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_finds_the_scalars_in_the_folder_of_the_logs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    settings = DPO(
        **quick(num_train_epochs=2), lora=LORA, held_out=0.25, report_to=("tensorboard",)
    )
    tuned = train_dpo(settings, pair_rows(8), base=str(tiny_model), output=tmp_path / "r1")
    events = EventAccumulator(str(tmp_path / "r1.logs" / "tensorboard"))
    events.Reload()
    for key in ("loss", "kl", "rewards/margins", "eval_loss", "eval_kl", "eval_rewards/margins"):
        tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
        kept = [
            (record["step"], pytest.approx(record[key], abs=1e-6))
            for record in tuned.history
            if key in record
        ]
        assert [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r1", "r1.logs"]
