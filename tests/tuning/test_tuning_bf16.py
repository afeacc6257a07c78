"""Training in bfloat16 rounds frozen weights of its own copy of the model: its every pass takes
that, and no one else sees it."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tuning_rows import LORA, labelled_rows, pair_rows, quick, sft_rows

from cowest_dspy.errors import TuningError
from cowest_dspy.lms import LocalEngine
from cowest_dspy.tuning import DPO, KTO, SFT, shared_prompt, tunable, tune

KINDS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "sft": (SFT, sft_rows(8)),
    "preference": (DPO, pair_rows(8)),
    "unpaired": (KTO, labelled_rows(8)),
}


def dtypes() -> Counter[str]:
    """The types of all parameters that are left in this process, and how many have each."""
    import torch

    gc.collect()
    return Counter(str(one.dtype) for one in gc.get_objects() if type(one) is torch.nn.Parameter)


def rounded() -> int:
    return dtypes()["torch.bfloat16"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_of_a_training_takes_rounded_weights_and_nothing_of_them_is_left(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    round_frozen = shared_prompt.round_frozen

    def watched(model: Any) -> None:
        round_frozen(model)
        seen.append(rounded())

    monkeypatch.setattr(shared_prompt, "round_frozen", watched)
    make, data = KINDS[kind]
    # The reference, evaluations, and a second start from a checkpoint.
    settings = quick(
        num_train_epochs=4,
        bf16=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        held_out=0.25,
        eval_steps=2,
        save_steps=1,
    )
    with closing(LocalEngine(tiny_model, dtype="float32")) as engine:
        weak = tunable(engine.lm(temperature=0.0, max_tokens=8))
        before, found = weak("How hot is press 1?"), dtypes()

        def stop(step: int, total: int, _: dict[str, float]) -> None:
            if step == 3:
                raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            tune(weak, data, make(**settings, lora=LORA), tmp_path / "out", on_step=stop)
        tuned = tune(weak, data, make(**settings, lora=LORA), tmp_path / "out")
        assert len(seen) == 2 and min(seen) > found["torch.bfloat16"], (
            "it has rounded them, each time"
        )
        assert not dtypes() - found, (
            "models of other tests may be in this process, and may go; nothing is added"
        )
        assert weak("How hot is press 1?", cache=False) == before
        assert tuned.lm("How hot is press 1?") and any(
            "eval_loss" in one for one in tuned.result.history
        )


def test_nothing_rounded_is_left_of_a_training_that_failed(
    tiny_model: Path, tmp_path: Path
) -> None:
    already = rounded()
    with closing(LocalEngine(tiny_model, dtype="float32")) as engine:
        weak = tunable(engine.lm(temperature=0.0, max_tokens=8))
        settings = SFT(**quick(num_train_epochs=4, bf16=True, learning_rate=1e30), lora=LORA)
        said = ""
        try:  # pytest.raises would keep the frames of the training, and with them its model.
            tune(weak, sft_rows(4), settings, tmp_path / "out")
        except TuningError as error:
            said = str(error)
        assert "diverged" in said
        assert rounded() <= already
        assert weak("How hot is press 1?")
