"""Law 8: the same seed gives the same pairs and, on one thread, a bit-identical adapter, also after
a stop or a kill."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import killed_training
import pytest
from engine_parts import prompts
from round_parts import VOWELS, examples, match, rules, strong_that_counts, student, taught  # noqa: F401 - fixtures
from scripted import match, questions, strong_that_reads, together
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures  # noqa: F401 - fixtures
from tuning_rows import (
    LORA,
    QUICK,
    Stopped,
    labelled,
    labelled_rows,
    left,
    pair_rows,
    pairs_with_one_turned_round,
    quick,
    same,
    sft_rows,
    train,
)

from cowest_dspy import DPO, KTO, SFT
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local import weights
from cowest_dspy.optimizers.rounds import gain
from cowest_dspy.pairs import PreferencePairs, preference_pairs
from cowest_dspy.store import serialize
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning import (
    DPO,
    KTO,
    SFT,
    Lora,
    train_adapter,
)


def test_law_8_the_same_seed_gives_the_same_pairs_and_another_does_not() -> None:
    def pairs(seed: int) -> PreferencePairs:
        weak = ScriptedEngine(
            lambda r: r["messages"][-1]["content"][-2] if r["config"]["seed"] % 2 else "x"
        )
        program = together(weak, strong_that_reads())
        return preference_pairs(
            collect(program, questions(10), match, Sampling(drafts=2, seed=seed))
        )

    assert pairs(1) == pairs(1)
    assert pairs(1) != pairs(2)


def test_law_8_the_same_seed_gives_the_same_bits_in_sft_and_dpo(
    first_sft: Any, tiny_model: Path, tmp_path: Path
) -> None:
    # The first of these was trained at another time, after other random numbers had been drawn.
    settings = SFT(**quick(num_train_epochs=4), lora=LORA)
    again = train_adapter(
        settings, sft_rows(), base=str(tiny_model), output=tmp_path / "again", seed=3
    )
    other = train_adapter(
        settings, sft_rows(), base=str(tiny_model), output=tmp_path / "other", seed=4
    )
    assert (again.path / "adapter_model.safetensors").read_bytes() == (
        first_sft.path / "adapter_model.safetensors"
    ).read_bytes()
    assert (again.path / "adapter_config.json").read_bytes() == (
        first_sft.path / "adapter_config.json"
    ).read_bytes()
    assert again.adapter_hash == first_sft.adapter_hash != other.adapter_hash
    made = [
        train_adapter(
            DPO(**QUICK),
            pair_rows(),
            base=str(tiny_model),
            adapter=first_sft.path,
            output=tmp_path / name,
            seed=5,
        )
        for name in ("a", "b")
    ]
    assert made[0].adapter_hash == made[1].adapter_hash
    assert made[0].history == made[1].history


def test_law_8_the_same_seed_gives_the_same_bits_in_kto(tiny_model: Path, tmp_path: Path) -> None:
    made = [
        train_adapter(
            KTO(**quick(num_train_epochs=2), lora=LORA),
            labelled_rows(4),
            base=str(tiny_model),
            output=tmp_path / name,
            seed=seed,
        )
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert made[0].adapter_hash == made[1].adapter_hash != made[2].adapter_hash
    assert made[0].history == made[1].history


@pytest.mark.parametrize("size", [1, 3, 16])
def test_law_8_a_sample_is_the_same_in_batches_of_1_3_and_16(tiny_model: Path, size: int) -> None:
    alone = LocalEngine(tiny_model, dtype="float32", max_batch=1)
    shared = LocalEngine(tiny_model, dtype="float32", max_batch=size)
    asked = [messages for messages in prompts(4) for _ in range(4)]

    def ask(engine: LocalEngine) -> list[str]:
        requests = [
            serialize.request_from_messages(
                engine.model_id, messages, max_tokens=10, temperature=1.0, seed=seed, top_p=0.95
            )
            for seed, messages in enumerate(asked)
        ]
        with ThreadPoolExecutor(len(requests)) as pool:
            return [serialize.response_text(one) for one in pool.map(engine.complete, requests)]

    assert ask(shared) == ask(alone)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_law_8_a_training_that_was_stopped_goes_on_to_the_same_bits(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    whole, told = train(kind, tiny_model, tmp_path / "whole")
    assert told == list(range(11))
    output = tmp_path / "twice" / "out"
    first, told = train(kind, tiny_model, output, stop=4, save_steps=1)
    assert first is None and told == [0, 1, 2, 3, 4]
    assert len(left(output)) == 1
    # What was drawn in between does not matter.
    random.random()
    second, told = train(kind, tiny_model, output, stop=8, save_steps=3)
    assert second is None and told == [3, 4, 5, 6, 7, 8]
    third, told = train(kind, tiny_model, output, save_steps=3)
    assert told == [6, 7, 8, 9, 10]
    assert same(third, whole)
    assert (third.tokens, third.trained_rows) == (whole.tokens, whole.trained_rows)
    assert left(output) == [], "the checkpoint goes when the adapter is there"


def evaluated(kind: str, base: Path, output: Path, stop: int | None = None, **changes: Any) -> Any:
    """A training with held-out rows, stopped after so many steps (None then); 12 steps if patience
    does not end it."""

    def on_step(step: int, total: int, logs: dict[str, float]) -> None:
        if step == stop:
            raise Stopped

    hard = quick(
        num_train_epochs=50,
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="constant_with_warmup",
    )
    hard |= {
        "lora": Lora(r=4, lora_alpha=8, lora_dropout=0.2),
        "held_out": 0.4,
        "eval_steps": 2,
    } | changes
    pairs = pairs_with_one_turned_round()
    run, settings, data = {
        "sft": (train_adapter, SFT, sft_rows(10)),
        "dpo": (train_adapter, DPO, pairs),
        "kto": (train_adapter, KTO, labelled(pairs)),
    }[kind]
    try:
        return run(settings(**hard), data, base=str(base), output=output, seed=1, on_step=on_step)
    except Stopped:
        return None


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_law_8_evaluations_go_on_where_they_were(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    whole = evaluated(kind, tiny_model, tmp_path / "whole", save_steps=0)
    output = tmp_path / "twice" / "out"
    # After an evaluation, in the middle between two, and before the first.
    for stop in (2, 6, 9, 10):
        assert evaluated(kind, tiny_model, output, stop=stop, save_steps=1) is None
    again = evaluated(kind, tiny_model, output, save_steps=3)
    assert same(again, whole) and (again.best_step, again.stopped_early) == (whole.best_step, False)
    assert [record["step"] for record in again.history if "eval_loss" in record] == list(
        range(0, 13, 2)
    )
    assert left(output) == []


def test_law_8_patience_and_the_best_adapter_outlive_a_process(
    tiny_model: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"early_stopping_patience": 3, "eval_steps": 1, "max_steps": 30}
    whole = evaluated("dpo", tiny_model, tmp_path / "whole", **options)
    last = whole.history[-1]["step"]
    assert whole.stopped_early and last == whole.best_step + 3
    for back in (3, 2, 1):
        output = tmp_path / str(back) / "out"
        assert (
            evaluated("dpo", tiny_model, output, stop=last - back + 1, save_steps=1, **options)
            is None
        )
        again = evaluated("dpo", tiny_model, output, **options)
        assert same(again, whole) and (again.best_step, again.stopped_early) == (
            whole.best_step,
            True,
        )
    # Without the best there is the last: it was another one.
    plain = evaluated("dpo", tiny_model, tmp_path / "last", load_best_model_at_end=False, **options)
    assert plain.adapter_hash != whole.adapter_hash


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("kind", ["sft", "dpo", "held"])
def test_law_8_a_training_killed_again_and_again_gives_the_same_bits(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    script = [sys.executable, killed_training.__file__, str(tmp_path), str(tiny_model), kind, "5"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"], (
        "weights, settings and history are those of a training that nobody has killed"
    )
    assert found["kills"] == killed_training.KILLS
    # Each life began at the last checkpoint of the one before it, so hardly anything was done
    # twice.
    assert found["began"][0] == 0 and all(later > 0 for later in found["began"][1:])
    assert found["began"] == sorted(found["began"])
    assert found["left"] == []
    if kind == "held":
        assert 0 < found["best"] < max(found["began"]) < found["steps"], (
            "the best was found in an earlier life"
        )


def test_law_8_the_order_of_examples_changes_no_interval() -> None:
    before = {f"q{i}": float(i % 3 == 0) for i in range(57)}
    after = {name: float(place % 5 > 1) for place, name in enumerate(before)}
    turned = gain(dict(reversed(before.items())), dict(sorted(after.items())))
    assert gain(before, after) == turned


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [
        ("GenuineIntel", "avx512f amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
        ("", "", False),
    ],
)
def test_law_8_the_type_of_the_weights_is_chosen_by_the_processor_and_not_by_how_busy_it_is(
    vendor: str, flags: str, faster: bool
) -> None:
    text = f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n" * 2
    assert weights.fast_in_bfloat16(text) == faster
