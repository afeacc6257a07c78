"""What tuning may be told, and what its rows look like: found out before anything is loaded."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tuning_rows import LORA, QUICK, labelled_rows, pair_rows, read, says, sft_rows

from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.tuning import (
    DPO,
    KTO,
    LOSS_TYPES,
    SFT,
    Lora,
    data,
    train_adapter,
    trainers,
)
from cowest_dspy.tuning.config import RESERVED, library_fields
from cowest_dspy.utils.table import MOVED

# Settings


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_loss_type_that_is_offered_trains(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    settings = DPO(
        **{**QUICK, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        loss_type=name,
        max_steps=2,
        label_smoothing=1e-3,
        lora=LORA,
    )
    tuned = train_adapter(settings, pair_rows(4), base=str(tiny_model), output=tmp_path / "out")
    assert [step["step"] for step in tuned.history] == [1, 2]
    assert any(bool(tensor.any()) for key, tensor in read(tuned.path).items() if "lora_B" in key), (
        "nothing was learnt"
    )


def test_no_other_loss_type_is_accepted_by_trl(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TRL names all of them in the error of one that it does not know.
    make = trainers.make_trainer

    def unknown(*arguments: Any) -> Any:
        trainer = make(*arguments)
        trainer.loss_types = ["nonsense"]
        return trainer

    monkeypatch.setattr(trainers, "make_trainer", unknown)
    with pytest.raises(ValueError, match="Unknown loss type: nonsense") as caught:
        train_adapter(
            DPO(**QUICK, lora=LORA), pair_rows(4), base=str(tiny_model), output=tmp_path / "out"
        )
    named = set(re.findall(r"'([a-z_]+)'", str(caught.value)))
    assert named <= set(LOSS_TYPES) and "sigmoid" in named
    # The loss types that its code compares with.
    import trl.trainer.dpo_trainer as source

    compared = set(
        re.findall(r'loss_type == "([a-z_]+)"', Path(source.__file__).read_text(encoding="utf-8"))
    )
    assert compared == set(LOSS_TYPES)


def test_losses_are_weighted_and_added(tiny_model: Path, tmp_path: Path) -> None:
    def first_loss(name: str, **options: Any) -> float:
        tuned = train_adapter(
            DPO(**QUICK, **options, lora=LORA),
            pair_rows(4),
            base=str(tiny_model),
            output=tmp_path / name,
        )
        return tuned.history[0]["loss"]

    sft = first_loss("sft", loss_type="sft")
    both = first_loss("both", loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    assert sft > 1
    assert both == pytest.approx(0.693147 + 0.5 * sft, abs=1e-4)


def test_offered_loss_types_are_those_that_trl_documents() -> None:
    from trl.trainer.dpo_config import DPOConfig

    documented = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert [name for name in LOSS_TYPES if f"'{name}'" in documented] == list(LOSS_TYPES)
    assert documented.count("`'") == len(LOSS_TYPES)


def test_a_wrong_loss_type_is_found_when_the_settings_are_made() -> None:
    with pytest.raises(
        ValidationError, match=r'TRL has no DPO loss "sigmod"\. Did you mean "sigmoid"'
    ):
        DPO(loss_type="sigmod")
    with pytest.raises(ValidationError, match="give one for each"):
        DPO(loss_type=("sigmoid", "sft"), loss_weights=(1.0,))
    with pytest.raises(ValidationError, match="label_smoothing"):
        DPO(loss_type="exo_pair")


def test_a_loss_of_kto_is_refused_in_dpo() -> None:
    with pytest.raises(ValidationError, match=r'"kto" is a loss of KTO'):
        DPO(loss_type="kto")


@pytest.mark.parametrize("settings", [SFT, DPO, KTO])
def test_an_old_key_is_told_what_to_write_instead(settings: Any) -> None:
    for name, new in MOVED["training"].items():
        with pytest.raises(
            ValidationError, match=rf"{name}: there is no such key here: write {re.escape(new)}\."
        ) as caught:
            settings(**{name: 1})
        assert "Known:" not in str(caught.value)
        word = re.split(r"[ ,;]", new)[0]
        known = Lora.model_fields if "in lora" in new else settings.model_fields
        assert word in known, "what is to be written exists"
    for name, new in MOVED["lora"].items():
        assert new.split()[0] in Lora.model_fields
        with pytest.raises(ValidationError, match=f"lora.*\n.*{name}: .* write {new}"):
            settings(lora={name: 4})


def test_every_field_of_trl_and_peft_is_taken_but_those_that_a_training_decides() -> None:
    every: tuple[Any, ...] = (SFT, DPO, KTO, Lora)
    for settings in every:
        fields = library_fields(settings.library_config)
        own = {"lora", "held_out", "early_stopping_patience", "share_prompt"}
        assert set(settings.model_fields) - own <= fields, "our fields have their names"
        for name in sorted(fields - set(settings.model_fields)):
            if name in RESERVED:
                with pytest.raises(ValidationError, match=f"{name}: it cannot be set: "):
                    settings(**{name: "x"})
                for done_anyway in RESERVED[name][1:]:
                    assert settings(**{name: done_anyway}) == settings()
            else:
                assert settings._fault(name) is None
    assert set(RESERVED) <= set().union(
        *(library_fields(kind.library_config) for kind in (SFT, DPO, KTO, Lora))
    )
    assert not {*MOVED["training"]} & set().union(
        *(library_fields(kind.library_config) for kind in (SFT, DPO, KTO))
    )


def test_every_field_that_is_taken_reaches_trl_and_peft_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    where = tmp_path / ".out.x.checkpoints"
    for settings in (SFT, DPO, KTO):
        free = library_fields(settings.library_config) - {*settings.model_fields, *RESERVED}
        given = {name: object() for name in free}
        made = trainers.trainer_arguments(
            settings(**given), labelled_rows(2), True, where, 0, False
        )
        assert {name: made[name] for name in free} == given
    free = library_fields("LoraConfig") - {*Lora.model_fields, *RESERVED}
    given: dict[str, Any] = {name: object() for name in free}
    monkeypatch.setattr(peft, "LoraConfig", dict)
    made = trainers.lora_config(Lora.model_construct(**Lora().model_dump(), **given))
    assert {name: made[name] for name in free} == given


def test_lora_may_be_an_object_of_peft() -> None:
    from peft import LoraConfig

    given: Any = LoraConfig(
        r=8,
        lora_alpha=64,
        target_modules=["v_proj", "q_proj"],
        task_type="CAUSAL_LM",
        use_rslora=True,
    )
    made = SFT(lora=given).lora
    assert made == Lora(r=8, lora_alpha=64, target_modules=("q_proj", "v_proj"), use_rslora=True)  # pyright: ignore[reportCallIssue]
    plain: Any = LoraConfig()
    assert DPO(lora=plain).lora == Lora(r=8, lora_alpha=8), "PEFT's defaults, but all layers"
    whole: Any = LoraConfig(modules_to_save=["lm_head"])
    with pytest.raises(ValidationError, match="modules_to_save: it cannot be set: only LoRA's own"):
        SFT(lora=whole)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva"])
def test_an_initialisation_that_would_not_be_what_it_says_is_refused(init: str) -> None:
    with pytest.raises(ValidationError, match=f'init_lora_weights = "{init}" .*give "gaussian"'):
        Lora(init_lora_weights=init)  # pyright: ignore[reportCallIssue]
    assert Lora(init_lora_weights="gaussian")  # pyright: ignore[reportCallIssue]


def test_other_fields_reach_trl_and_peft(tiny_model: Path, tmp_path: Path) -> None:
    settings = DPO(
        **QUICK,
        lora={**LORA.model_dump(), "use_rslora": True},  # pyright: ignore[reportArgumentType]
        weight_decay=0.25,  # pyright: ignore[reportCallIssue]
        use_weighting=True,  # pyright: ignore[reportCallIssue]
    )
    assert DPO(**settings.model_dump(mode="json")) == settings
    trainer = trainers.make_trainer(
        settings, pair_rows(2), [], tiny_model, None, tmp_path / ".out.x.checkpoints", 0
    )
    assert (trainer.args.weight_decay, trainer.args.use_weighting) == (0.25, True)
    assert trainer.model.peft_config["default"].use_rslora is True


def test_all_unknown_keys_are_told_at_once_also_those_of_other_settings_and_of_lora() -> None:
    with pytest.raises(ValidationError) as caught:
        SFT(beta=0.1, desirable_weight=1, rank=8, epoch=3)  # pyright: ignore[reportCallIssue]
    told = str(caught.value)
    assert "beta: there is no such key here: it is one of DPO and KTO" in told
    assert "desirable_weight: there is no such key here: it is one of KTO" in told
    assert "rank: there is no such key here: it is one of lora" in told
    assert "epoch: there is no such key. Did you mean" in told
    assert "and every other field of SFTConfig" in told


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SFT().num_train_epochs = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_steps_are_whole() -> None:
    settings = SFT(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2)
    assert [settings.steps(count) for count in (1, 2, 4, 5, 9)] == [1, 1, 2, 3, 5]
    assert settings.model_copy(update={"max_steps": 3}).steps(9) == 3
    assert settings.model_copy(update={"num_train_epochs": 0.5}).steps(16) == 2


# Rows and their order


def test_every_pass_holds_every_row_once() -> None:
    order = data.training_order([3, 1, 4, 1, 5], steps=5, step_rows=3, seed=1)
    assert len(order) == 15
    assert sorted(order) == sorted([*range(5)] * 3)


def test_the_order_depends_on_the_seed_only() -> None:
    lengths = [random.Random(0).randrange(5, 50) for _ in range(40)]
    first, again, other = (data.training_order(lengths, 5, 8, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [lengths[index] for index in first[:8]] == sorted(
        (lengths[index] for index in first[:8]), reverse=True
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [says("user", "a")]}, '"completion" must be a list of messages'),
        (
            {"prompt": "a", "completion": [says("assistant", "b")]},
            '"prompt" must be a list of messages',
        ),
        (
            {"prompt": [says("user", "a")], "completion": [says("user", "b")]},
            "must end in an assistant message",
        ),
        (
            {"prompt": [says("user", "a")], "completion": [says("assistant", " \n")]},
            "is empty text",
        ),
        (
            {"prompt": [], "completion": [says("assistant", "b")]},
            '"prompt" must be a list of messages',
        ),
    ],
)
def test_a_malformed_row_is_named_before_a_model_is_loaded(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError):
        train_adapter(SFT(), sft_rows(2), base=str(tmp_path / "no model"), output=tmp_path / "out")
    with pytest.raises(TuningError, match=f"Row 1: .*{message}"):
        data.sft_rows([*sft_rows(1), row])


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no SFT rows"):
        data.sft_rows([])
    with pytest.raises(TuningError, match="no preference rows"):
        data.preference_rows([])
    same = pair_rows(2)
    same[1]["rejected"] = same[1]["chosen"]
    with pytest.raises(TuningError, match=r"1 row \(1\): chosen and rejected are the same text"):
        data.preference_rows(same)
