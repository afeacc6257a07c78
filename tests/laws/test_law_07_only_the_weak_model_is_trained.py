"""Law 7: only the weak model is trained, and only on the tokens that it is to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_experiment import (
    task,  # noqa: F401 - fixtures
)
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import LORA, QUICK, completion_logprob, pair_rows, sft_rows, watch_parameters

from cowest_dspy import Experiment, load_config
from cowest_dspy.tuning import (
    DPO,
    SFT,
    train_adapter,
)


def test_law_7_the_sft_loss_is_that_of_the_completions_tokens_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = sft_rows(4)
    tuned = train_adapter(SFT(**QUICK), data, base=str(tiny_model), output=tmp_path / "out")
    sums = [completion_logprob(tiny_model, row["prompt"], row["completion"]) for row in data]
    expected = -sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert tuned.history[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_law_7_only_the_adapter_changes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_parameters(monkeypatch)
    before = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    first = train_adapter(
        SFT(**QUICK, lora=LORA), sft_rows(), base=str(tiny_model), output=tmp_path / "sft"
    )
    assert seen["changed"] == {name for name in seen["all"] if ".lora_" in name}
    train_adapter(
        DPO(**QUICK), pair_rows(), base=str(tiny_model), adapter=first.path, output=tmp_path / "dpo"
    )
    # The reference, a copy of the adapter under another name, stays as it was.
    assert not any(".ref." in name for name in seen["all"]), "the reference is computed already"
    assert seen["changed"] == {
        name for name in seen["all"] if ".lora_" in name and ".default." in name
    }
    assert {path.name: path.read_bytes() for path in tiny_model.iterdir()} == before


def test_law_7_the_strong_model_and_the_base_are_never_trained(
    task: list[Path], tmp_path: Path, tiny_model: Path
) -> None:
    before = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        tuned = experiment.tune()
        assert tuned.model.startswith(experiment.weak.model + "+")
        assert not (tmp_path / "run/adapters/strong").exists()
    assert before == {file.name: file.read_bytes() for file in tiny_model.iterdir()}
