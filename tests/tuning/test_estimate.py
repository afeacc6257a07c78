"""Memory and time of a training before it starts: against a measured training, and in what
direction each setting moves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as st
from tiny import make_tiny_model
from tuning_rows import pair_rows, sft_rows

from cowest_dspy.lms.local import footprint
from cowest_dspy.tuning import DPO, KTO, SFT, Lengths, Lora, Machines, estimate, foreseen
from cowest_dspy.tuning.speed import layer_speed

ROOT = Path(__file__).parents[2]
LENGTHS = Lengths(rows=64, longest=200, prompt=100.0, completion=60.0)
PAIRS = Lengths(rows=64, longest=200, prompt=100.0, completion=60.0, sides=2)
# In a process of its own: what was freed before would be taken again, and not be seen.
MEASURED = """
import gc, json, sys
from pathlib import Path
import psutil
from tuning_rows import pair_rows, sft_rows
from cowest_dspy.lms.local import weights
from cowest_dspy.tuning import DPO, SFT, Lengths, Lora, estimate, train_dpo, train_sft

folder, tiny, out, kind, long = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
train, make, rows = {"sft": (train_sft, SFT, sft_rows(8)), "dpo": (train_dpo, DPO, pair_rows(8))}[kind]
how = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False, "save_steps": 0}
train(make(**how), rows, base=tiny, output=out / "first")          # whatever is imported and built once
for row in rows:
    for name in ("completion", "chosen", "rejected"):
        for message in row.get(name, []):
            message["content"] += " bar" * long
expected = estimate(make(**how, per_device_train_batch_size=8, gradient_accumulation_steps=1), Lengths.of(rows, folder), folder, measure=False)
gc.collect(); weights.return_memory()
before = psutil.Process().memory_info().rss
tuned = train(make(**how, per_device_train_batch_size=8, gradient_accumulation_steps=1), rows, base=str(folder), output=out / "second")
print(json.dumps([expected.memory.own, tuned.peak_memory_bytes - before]))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose training takes some hundred megabytes: less would drown in what Python takes
    and gives back."""
    shape = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "max_position_embeddings": 1024,
    }
    return make_tiny_model(tmp_path_factory.mktemp("wide") / "wide", **shape)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "long"), [("sft", 200), ("dpo", 90)])
def test_memory_is_within_a_factor_of_two_of_what_a_training_took(
    kind: str, long: int, wide: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    command = [
        sys.executable,
        "-c",
        MEASURED,
        str(wide),
        str(tiny_model),
        str(tmp_path),
        kind,
        str(long),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured > 100 * 2**20, "too little to tell anything by"
    assert 0.5 < expected / measured < 2, (expected / 2**20, measured / 2**20)


def own(settings: Any, lengths: Lengths, folder: Path, **more: Any) -> float:
    return estimate(settings, lengths, folder, measure=False, **more).memory.own


def test_weights_and_adapter_are_counted_exactly(tiny_model: Path, first_sft: Any) -> None:
    from safetensors import safe_open

    found = estimate(
        SFT(bf16=False, lora=Lora(r=4, lora_alpha=8)), LENGTHS, tiny_model, measure=False
    ).memory
    assert found.weights == 4 * footprint.parameters(tiny_model)
    with safe_open(first_sft.path / "adapter_model.safetensors", framework="pt") as tensors:
        trained = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 - no mapping
    assert found.adapter == 4 * trained * 4, (
        "numbers, gradients, and Adam's two averages, in float32"
    )


@given(long=st.integers(20, 400), micro=st.sampled_from([1, 2, 4, 8]), rank=st.integers(1, 64))
@rules(max_examples=30)
def test_more_of_anything_takes_more(long: int, micro: int, rank: int, tiny_model: Path) -> None:
    def of(
        long: int = long,
        micro: int = micro,
        rank: int = rank,
        kind: Any = SFT,
        lengths: Lengths | None = None,
    ) -> float:
        settings = kind(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            micro_batch_size=micro,
            bf16=False,
            lora=Lora(r=rank),
        )
        return own(settings, lengths or Lengths(64, long, 10.0, 8.0), tiny_model)

    base = of()
    assert of(long=long + 1) > base and of(micro=16) > base and of(rank=rank + 1) > base
    assert of(kind=DPO, lengths=Lengths(64, long, 10.0, 8.0, 2)) > base, "two sides"


def test_a_shared_prompt_bf16_and_shards_take_less(tiny_model: Path) -> None:
    base = own(DPO(bf16=False), PAIRS, tiny_model)
    assert own(DPO(bf16=False, share_prompt=False), PAIRS, tiny_model) > base
    assert own(DPO(bf16=True), PAIRS, tiny_model) < base
    assert own(DPO(bf16=False), PAIRS, tiny_model, further=True) > base, (
        "the reference is a copy of the adapter"
    )
    assert own(SFT(bf16=False), LENGTHS, tiny_model, further=True) == own(
        SFT(bf16=False), LENGTHS, tiny_model
    )
    sharded = Machines(4, cpu=False, config={"fsdp_config": {"fsdp_version": 2}})
    assert own(DPO(bf16=False), PAIRS, tiny_model, where=sharded) < base


def test_processes_that_share_a_memory_need_it_together(tiny_model: Path) -> None:
    one, four = (
        estimate(SFT(), LENGTHS, tiny_model, where=Machines(count), measure=False)
        for count in (1, 4)
    )
    assert four.needed == pytest.approx(4 * four.memory.total) and one.needed == one.memory.own
    two_machines = estimate(
        SFT(), LENGTHS, tiny_model, where=Machines(4, 2, address="h"), measure=False
    )
    assert two_machines.needed == pytest.approx(four.needed / 2)


def test_time_grows_with_steps_and_is_that_of_a_real_layer(tiny_model: Path) -> None:
    speed = layer_speed(tiny_model, Lora(), False)
    assert speed is not None and 0 < speed.forward_token < speed.both_token
    few, many = (
        estimate(SFT(max_steps=steps, num_train_epochs=10), LENGTHS, tiny_model)
        for steps in (2, 20)
    )
    assert few.seconds and many.seconds and many.seconds == pytest.approx(10 * few.seconds)
    assert (few.steps, many.steps) == (2, 20)
    preferring = estimate(
        DPO(max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=4),
        PAIRS,
        tiny_model,
    ).seconds
    assert preferring and preferring > few.seconds


@pytest.mark.parametrize(("rows", "sides"), [(sft_rows(100), 1), (pair_rows(100), 2)])
def test_lengths_are_those_of_the_models_own_tokenizer(
    rows: list[Any], sides: int, tiny_model: Path
) -> None:
    from cowest_dspy.lms.local import weights

    rows[37][("completion", "chosen")[sides - 1]][0]["content"] = "the longest of all " * 9
    found = Lengths.of(rows, tiny_model)
    tokenizer = weights.load_tokenizer(tiny_model)
    whole = [
        len(tokenizer.apply_chat_template([*row["prompt"], *row[name]], return_dict=False))
        for row in rows
        for name in ("completion", "chosen", "rejected")
        if name in row
    ]
    assert (found.rows, found.sides, found.longest) == (100, sides, max(whole))
    assert found.prompt + found.completion == pytest.approx(sum(whole) / len(whole), rel=0.15)


def test_what_does_not_fit_is_told_with_what_to_change(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = estimate(DPO(), PAIRS, tiny_model, measure=False)
    assert found.fits and found.warning() is None
    assert str(found).startswith("about 0.") and str(found).endswith(" free, 32 steps")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    short = estimate(DPO(), PAIRS, tiny_model, measure=False)
    assert not short.fits and "lower micro_batch_size" in str(short.warning())


@pytest.mark.parametrize("rows", [[], [{"prompt": "no messages"}], [{"completion": []}]])
def test_rows_that_cannot_be_trained_on_are_left_to_training_to_refuse(
    rows: list[Any], tiny_model: Path
) -> None:
    assert foreseen(SFT(), rows, tiny_model) is None
    assert foreseen(KTO(), LENGTHS, "nowhere/at-all") is None
