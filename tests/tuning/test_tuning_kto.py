"""KTO, on a real tiny model with the real TRL: labels matter, the KL term is of the batch, and what
cannot be says why."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import (
    LORA,
    QUICK,
    completion_logprob,
    labelled_rows,
    pair_rows,
    quick,
    read,
    says,
    watch_parameters,
)

from cowest_dspy.errors import TuningError
from cowest_dspy.lms import LocalEngine
from cowest_dspy.tuning import KTO, KTO_LOSS_TYPES, SFT, data, train_adapter, tunable, tune


def gaps(tiny_model: Path, adapter: Path | None) -> list[float]:
    """For each pair, how much more likely the chosen side is than the rejected one."""
    return [
        completion_logprob(tiny_model, row["prompt"], row["chosen"], adapter)[0]
        - completion_logprob(tiny_model, row["prompt"], row["rejected"], adapter)[0]
        for row in pair_rows(4)
    ]


def test_desirable_becomes_likelier_against_undesirable_than_in_the_reference(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = KTO(**quick(num_train_epochs=8), lora=LORA)
    tuned = train_adapter(settings, labelled_rows(4), base=str(tiny_model), output=tmp_path / "out")
    assert tuned.history[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert tuned.history[-1]["loss"] < 0.4
    assert all(
        after > before
        for before, after in zip(gaps(tiny_model, None), gaps(tiny_model, tuned.path), strict=True)
    )
    # The same rows with the labels exchanged teach the opposite.
    wrong = [{**row, "label": not row["label"]} for row in labelled_rows(4)]
    other = train_adapter(settings, wrong, base=str(tiny_model), output=tmp_path / "wrong")
    assert all(
        after < before
        for before, after in zip(gaps(tiny_model, None), gaps(tiny_model, other.path), strict=True)
    )


def test_kto_starts_from_the_adapter_holds_it_as_the_reference_and_changes_nothing_else(
    first_sft: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_parameters(monkeypatch)
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    data = labelled_rows(2)
    tuned = train_adapter(
        KTO(**QUICK), data, base=str(tiny_model), adapter=first_sft.path, output=tmp_path / "out"
    )
    assert seen["changed"] == {
        name for name in seen["all"] if ".lora_" in name and ".default." in name
    }
    assert not any(".ref." in name for name in seen["all"]), "the reference is computed already"
    assert {path.name: path.read_bytes() for path in tiny_model.iterdir()} == files
    assert tuned.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    desirable = [
        completion_logprob(tiny_model, row["prompt"], row["completion"], first_sft.path)[0]
        for row in data
        if row["label"]
    ]
    assert tuned.history[0]["logps/chosen"] == pytest.approx(
        sum(desirable) / len(desirable), abs=1e-3
    )


def test_the_rarer_label_weighs_more_and_weights_are_those_of_the_loss(
    tiny_model: Path, tmp_path: Path
) -> None:
    assert (
        KTO().weights(30, 10) == (1.0, 3.0)
        and KTO().weights(10, 30) == (3.0, 1.0)
        and KTO().weights(4, 4) == (1.0, 1.0)
    )
    assert KTO(undesirable_weight=2.0).weights(30, 10) == pytest.approx((2 / 3, 2.0))
    assert KTO(desirable_weight=1.0, undesirable_weight=1.0).weights(30, 10) == (1.0, 1.0)
    data = [row for place, row in enumerate(labelled_rows(4)) if row["label"] or place == 1]
    first = [
        train_adapter(
            KTO.model_validate(
                {
                    **quick(per_device_train_batch_size=5, gradient_accumulation_steps=1),
                    **weights,
                    "lora": LORA,
                }
            ),
            data,
            base=str(tiny_model),
            output=path,
        )
        for path, weights in (
            (tmp_path / "even", {}),
            (tmp_path / "one", {"desirable_weight": 1.0, "undesirable_weight": 1.0}),
        )
    ]
    # Every loss is 1/2 at the start: four desirable ones and one undesirable, which weighs 4.
    assert [made.history[0]["loss"] for made in first] == pytest.approx(
        [(4 * 0.5 + 4 * 0.5) / 5, 0.5], abs=1e-5
    )


def test_training_says_nothing_by_itself_and_writes_two_files(
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = KTO(**QUICK, desirable_weight=1.0, undesirable_weight=1.0, lora=LORA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = [row for place, row in enumerate(labelled_rows(4)) if row["label"] or place == 1]
        tuned = train_adapter(settings, data, base=str(tiny_model), output=tmp_path / "out")
    assert [str(warning.message) for warning in caught] == [] and capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    assert KTO(**tuned.settings) == settings and read(tuned.path)


def test_tune_takes_unpaired_rows_and_only_with_kto(tiny_model: Path, tmp_path: Path) -> None:
    engine = LocalEngine(tiny_model, dtype="float32")
    weak = tunable(engine.lm(temperature=0.0, max_tokens=8))
    tuned = tune(weak, labelled_rows(2), KTO(**QUICK, lora=LORA), tmp_path / "out", least=2)
    assert tuned.model == f"{weak.model}+{tuned.result.adapter_hash}"
    with pytest.raises(
        TuningError, match=r"label are tuned on with KTO\(...\), but settings is SFT"
    ):
        tune(weak, labelled_rows(2), SFT(), tmp_path / "no")
    with pytest.raises(
        TuningError, match=r"rejected are tuned on with DPO\(...\), but settings is KTO"
    ):
        tune(weak, pair_rows(2), KTO(), tmp_path / "no")
    engine.close()


def test_a_malformed_row_is_named() -> None:
    good = labelled_rows(1)
    assert data.unpaired_rows(good) == [
        {key: row[key] for key in ("prompt", "completion", "label")} for row in good
    ]
    with pytest.raises(TuningError, match=r'Row 1: "label" must be true .* 1 was given'):
        data.unpaired_rows([good[0], {**good[1], "label": 1}])
    with pytest.raises(TuningError, match='Row 0: "completion" must be a list of messages'):
        data.unpaired_rows([{"prompt": [says("user", "a")], "label": True}])
    with pytest.raises(TuningError, match="no unpaired rows"):
        data.unpaired_rows([])
    with pytest.raises(TuningError, match=r"All 2 rows have the label true: .* or use SFT"):
        data.unpaired_rows([good[0], good[0]])


def test_offered_losses_are_those_that_trl_documents() -> None:
    from trl.trainer.kto_config import KTOConfig

    assert tuple(KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"]) == KTO_LOSS_TYPES
    with pytest.raises(ValidationError, match="'kto' or 'apo_zero_unpaired'"):
        KTO(loss_type="sigmoid")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValidationError, match="per_device_train_batch_size is 1: give 2 or more"):
        KTO(per_device_train_batch_size=1)
    assert KTO(per_device_train_batch_size=1, loss_type="apo_zero_unpaired").step_rows == 2


def test_a_prompt_is_given_the_completion_of_another_row_of_its_forward_pass(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    seen: list[Any] = []
    run = Trainer.train

    def watched(trainer: Any, **options: Any) -> Any:
        seen.extend(trainer.train_dataset)
        return run(trainer, **options)

    monkeypatch.setattr(Trainer, "train", watched)
    train_adapter(
        KTO(**QUICK, lora=LORA), labelled_rows(4), base=str(tiny_model), output=tmp_path / "out"
    )
    for start in range(0, 8, 4):
        rows = seen[start : start + 4]
        own, mixed = ([row[key] for row in rows] for key in ("completion_ids", "KL_completion_ids"))
        assert sorted(own) == sorted(mixed) and own == [*mixed[1:], mixed[0]]
    assert [row["completion"] for row in seen] != [row["completion"] for row in labelled_rows(4)], (
        "rows are shuffled, so that a neighbour is not the same question's other draft"
    )
    assert all(row["ref_logps"] < 0 for row in seen)
